"""halo gc: remove what the recipe of a run no longer refers to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from durable_files import discard_leftovers, temporary_sibling
from halo_cluster import RunFolder, StageRecord
from halo_cluster.jobs import StageJob
from halo_cluster.slurm.queue import live_jobs
from halo_jobs.commands.consoles import console
from halo_reports.monitoring.readings import check_run


def gc(
    run_folder: Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo.")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
) -> None:
    """List stage folders that the run's latest recipe does not refer to, with their sizes; remove them with `--yes`.

    Refused while a stage of an earlier recipe is queued or running, because it reads other stages.
    """
    check_run(run_folder)
    run = RunFolder(run_folder)
    if yes:
        with run.opened():
            _list(unreferenced := _unreferenced(run), "removed")
            for stage in {record.folder.parent for record in run.records()}:
                discard_leftovers(stage)
            for record in unreferenced:
                _remove(record)
    else:
        _list(_unreferenced(run), "would be removed; add --yes to remove it")


def _unreferenced(run: RunFolder) -> list[StageRecord]:
    planned = {record.folder for record in run.planned()}
    if not planned:
        raise ValueError(f"{run.folder} has no plan.json, which says what is in use; start it once with `halo run`")
    candidates = [
        StageJob(record.stage, record, {}) for record in run.records() if record.folder not in planned
    ]
    queued = live_jobs() if any(job.jobs_folder.exists() for job in candidates) else {}
    for job in candidates:
        if job.job_name in queued or any(attempt.state == "running" for attempt in job.record.attempts()):
            raise ValueError(f"{job.record.folder} of an earlier recipe is still in use; wait, or `halo cancel` it")
    return [job.record for job in candidates]


def _remove(record: StageRecord) -> None:
    """Under another name first, so that a killed removal leaves no damaged stage behind."""
    doomed = temporary_sibling(record.folder)
    record.folder.rename(doomed)
    shutil.rmtree(doomed)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _list(records: list[StageRecord], what: str) -> None:
    table = Table("stage", "input hash", "size")
    sizes = [_bytes(record.folder) for record in records]
    for record, size in zip(records, sizes, strict=True):
        table.add_row(record.stage, record.input_hash, decimal(size))
    if records:
        console.print(table)
    console.print(f"{len(records)} stage folders, {decimal(sum(sizes))}: {what}", highlight=False)
