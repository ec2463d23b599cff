"""Where the stages of a run are, read from its folder.

recipe.yaml                              how many steps a training stage has
<stage>/<input hash>/attempt.<label>/    state, host, heartbeat, reason of an end
                     jobs/<id>.json      submitted to a scheduler
                     metrics.jsonl       training: a line per step
                     progress.json       stages of tasks (select, evaluate): tasks done and in all
                     checkpoints/        training: what is saved
                     DONE.json           finished
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from durable_files import read_json
from halo_cluster import AttemptState, RunFolder, StageRecord, StageStatus
from halo_cluster.attempts import attempt_folders
from halo_cluster.run_folder import RECIPE_FILE
from halo_cluster.stage_id import StageId
from halo_training.files import METRICS_FILE, PROGRESS_FILE

JOBS_FOLDER = "jobs"
StageState = AttemptState | Literal["pending"]
"""Pending: submitted to a scheduler, and no attempt begun."""
_TAIL_BYTES = 1 << 16  # of metrics.jsonl, whose lines have some 300 bytes


@dataclass(frozen=True)
class StageReading:
    """One stage. What is None is not known: not recorded yet, or nothing that such a stage has."""

    stage: str
    input_hash: str
    folder: str
    state: StageState
    attempts: int
    attempt: str
    """Label of the newest attempt, as in attempt.<label>; empty before the first."""
    job: str
    """The scheduler's number of the newest submission; empty without a scheduler."""
    started: str
    """Of the first attempt, ISO 8601; empty before it."""
    seconds: float
    """Wall time over all attempts."""
    node: str
    """Host of the newest attempt."""
    reason: str
    """Why the newest attempt ended, if it did not end well; while one runs, why the one before it did not."""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens_per_second: float | None = None
    """Mean of the newest attempt."""
    tasks_done: int | None = None
    tasks: int | None = None
    progress: float | None = None
    """Share of the stage that is done, 0 to 1."""
    seconds_left: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_seconds: float | None = None
    heartbeat_age_seconds: float | None = None
    """Of a running stage: seconds since its process last showed that it lives."""
    host_memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None


def is_run(folder: Path) -> bool:
    return (folder / RECIPE_FILE).is_file()


def check_run(folder: Path) -> None:
    """ValueError unless `folder` is a run's."""
    if not is_run(folder):
        raise ValueError(f"{folder} is not a run's folder; give one that `halo run` made, such as runs/demo")


def find_runs(folder: Path) -> list[Path]:
    """`folder` itself if it is a run's, otherwise the runs in it."""
    if is_run(folder):
        return [folder]
    return sorted(inner for inner in folder.iterdir() if is_run(inner)) if folder.is_dir() else []


def latest_of_each_stage(run: Path) -> list[StageStatus]:
    """Every stage that was begun, in the order in which they were.

    Of the folders of a stage the one counts that the run's latest recipe refers to.
    """
    folder = RunFolder(run)
    planned = {record.folder for record in folder.planned()}
    return sorted((row for row in folder.status() if row.record.folder in planned), key=_begun)


def _begun(row: StageStatus) -> tuple[str, float]:
    """When a stage was; what a run says of itself in whole seconds, the file system says to the end."""
    return row.attempts[0].started, _modified(attempt_folders(row.record.folder)[0] / "started.json") or 0.0


def read_run(run: Path) -> list[StageReading]:
    """A reading of every stage that was begun, then of those only submitted. ValueError if it is not a run's folder."""
    check_run(run)
    recipe = _recipe(run)
    begun = [_read_stage(row, recipe) for row in latest_of_each_stage(run)]
    names = {stage.stage for stage in begun}
    pending = [_pending(record, recipe) for record in submitted(run) if record.stage not in names]
    return begun + sorted(pending, key=lambda stage: int(stage.job))


def submitted(run: Path) -> list[StageRecord]:
    """Stages of the run's latest recipe that were submitted to a scheduler."""
    return [record for record in RunFolder(run).planned() if job_numbers(record.folder)]


def job_numbers(stage_folder: Path) -> list[int]:
    """The scheduler's numbers of the stage's submissions, oldest first."""
    notes = (path.stem for path in (stage_folder / JOBS_FOLDER).glob("*.json"))
    return sorted(int(name) for name in notes if name.isdecimal())


def _pending(record: StageRecord, recipe: dict[str, Any]) -> StageReading:
    return StageReading(
        stage=record.stage,
        input_hash=record.input_hash,
        folder=str(record.folder),
        state="pending",
        attempts=0,
        attempt="",
        job=str(job_numbers(record.folder)[-1]),
        started="",
        seconds=0.0,
        node="",
        reason="",
        steps=_steps(recipe, record.stage),
    )


def _recipe(run: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load((run / RECIPE_FILE).read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_stage(row: StageStatus, recipe: dict[str, Any]) -> StageReading:
    folder, newest = row.record.folder, row.attempts[-1]
    runs = row.state == "running"
    metrics, tasks = last_metrics(folder), _read_progress(folder)
    steps = _steps(recipe, row.record.stage)
    saved, saved_at = newest_checkpoint(folder)
    beat_at = _modified(attempt_folders(folder)[-1] / "heartbeat")
    return StageReading(
        stage=row.record.stage,
        input_hash=row.record.input_hash,
        folder=str(folder),
        state=row.state,
        attempts=len(row.attempts),
        attempt=newest.label,
        job=next((str(number) for number in reversed(job_numbers(folder))), ""),
        started=row.attempts[0].started,
        seconds=row.seconds,
        node=newest.host,
        reason=_reason(row),
        step=metrics.get("step"),
        steps=steps,
        loss=metrics.get("loss"),
        learning_rate=metrics.get("learning_rate"),
        gradient_norm=metrics.get("gradient_norm"),
        tokens_per_second=metrics.get("tokens_per_second"),
        tasks_done=tasks.get("done"),
        tasks=tasks.get("total"),
        progress=_progress(row, metrics, steps, tasks),
        seconds_left=_seconds_left(metrics, steps, tasks) if runs else None,
        checkpoint_step=saved,
        checkpoint_age_seconds=_age(saved_at),
        heartbeat_age_seconds=_age(beat_at) if runs else None,
        host_memory_bytes=metrics.get("host_memory_bytes"),
        gpu_memory_bytes=metrics.get("gpu_memory_bytes"),
    )


def _reason(row: StageStatus) -> str:
    if row.state == "done":
        return ""
    return next((attempt.reason for attempt in reversed(row.attempts) if attempt.reason), "")


def last_metrics(stage_folder: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl; empty for stages that do not train, or have not begun to."""
    try:
        with open(stage_folder / METRICS_FILE, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        with suppress(ValueError):  # being written, or cut short by a kill
            return dict(json.loads(line))
    return {}


def _steps(recipe: dict[str, Any], stage: str) -> int | None:
    """Of a training stage: `distill.hybrid` trains as the recipe's section `distill` says."""
    section = recipe.get(StageId.parse(stage).kind)
    return section.get("steps") if isinstance(section, dict) else None


def _read_progress(stage_folder: Path) -> dict[str, Any]:
    path = stage_folder / PROGRESS_FILE
    try:
        return dict(read_json(path)) if path.exists() else {}
    except (ValueError, TypeError):
        return {}


def _progress(
    row: StageStatus, metrics: dict[str, Any], steps: int | None, tasks: dict[str, Any]
) -> float | None:
    if row.state == "done":
        return 1.0
    if steps:
        return float(metrics.get("step", 0) / steps)
    return float(tasks["done"] / tasks["total"]) if tasks.get("total") else None


def _seconds_left(metrics: dict[str, Any], steps: int | None, tasks: dict[str, Any]) -> float | None:
    if metrics and steps:
        tokens_per_step = metrics["consumed_tokens"] / metrics["step"]
        return float((steps - metrics["step"]) * tokens_per_step / metrics["tokens_per_second"])
    return tasks.get("seconds_left")


def newest_checkpoint(stage_folder: Path) -> tuple[int | None, float | None]:
    """Step and time of the newest published checkpoint; a stage that is done keeps none."""
    names = (path.name.removeprefix("step-") for path in (stage_folder / "checkpoints").glob("step-????????"))
    step = max((int(name) for name in names if name.isdecimal()), default=None)
    if step is None:
        return None, None
    return step, _modified(stage_folder / "checkpoints" / f"step-{step:08d}")


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # dropped in the meantime
        return None


def _age(moment: float | None) -> float | None:
    """Seconds since; never negative, for the file server's clock may be ahead of ours."""
    return None if moment is None else max(0.0, time.time() - moment)
