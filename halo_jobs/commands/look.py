"""halo status, halo report: what a run folder holds. They write no record and need no right to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from halo_cluster import RunFolder, StageStatus
from halo_cluster.run_folder import RECIPE_FILE
from halo_jobs.commands.consoles import console

RunArgument = Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo.")]

_STYLES = {"done": "green", "running": "cyan", "interrupted": "yellow", "failed": "red"}


def _stages(run_folder: Path) -> list[StageStatus]:
    if not (run_folder / RECIPE_FILE).is_file():
        raise ValueError(
            f"{run_folder} is not a run's folder; give one that `halo run` made, such as runs/demo"
        )
    return RunFolder(run_folder).status()


def last_metrics(stage_folder: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl; empty for stages that do not train, or have not begun to."""
    path = stage_folder / "metrics.jsonl"
    for line in reversed(path.read_text().splitlines() if path.is_file() else []):
        try:
            return dict(json.loads(line))
        except json.JSONDecodeError:  # being written, or cut short by a kill
            continue
    return {}


def status(run_folder: RunArgument) -> None:
    """Show every stage that was begun: state, attempts, time, where its training is, why it failed.

    Works beside a run in progress, from another terminal or another machine that sees the folder.
    """
    rows = _stages(run_folder)
    table = Table(title=str(run_folder), title_justify="left")
    for column in ("stage", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("attempts", "seconds", "step", "loss", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        metrics = last_metrics(row.record.folder)
        training = (
            (f"{metrics['step']:,}", f"{metrics['loss']:.4g}", f"{metrics['tokens_per_second']:,.0f}")
            if metrics
            else ("", "", "")
        )
        table.add_row(
            row.record.stage,
            Text(row.state, _STYLES[row.state]),
            str(len(row.attempts)),
            f"{row.seconds:,.0f}",
            *training,
        )
    console.print(table)
    for row in rows:
        if row.reason and row.state != "done":
            remark = f"{row.record.stage} {row.state}: {row.reason}"
            console.print(Text(remark, _STYLES[row.state]), soft_wrap=True)


def report(run_folder: RunArgument) -> None:
    """Write report.html again, from whatever the stages have published so far."""
    stages = _stages(run_folder)
    from halo_cluster import storage_errors
    from halo_jobs.report import build_report

    # The inputs of a run may have changed on the way: of a stage's folders a finished one counts, the latest of them.
    folders: dict[str, Path] = {}
    for row in sorted(stages, key=lambda row: row.state == "done"):
        folders[row.record.stage] = row.record.folder
    with storage_errors(run_folder):
        page = build_report(run_folder, folders, run_folder / "report.html")
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)
