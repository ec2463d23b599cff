"""The state of the stages of a run, read from its folder.

recipe.yaml                              number of steps of a training stage
<stage>/<input hash>/attempt.<label>/    state, host, heartbeat, reason it ended
                     jobs/<id>.json      submitted to a scheduler
                     metrics.jsonl       of a training: one line per step
                     progress.json       of select and evaluate: finished and total tasks
                     checkpoints/        of a training
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
from halo_cluster.record import CHECKPOINTS
from halo_cluster.run_folder import RECIPE_FILE
from halo_cluster.stage_id import StageId
from halo_training.files import METRICS_FILE, PROGRESS_FILE

JOBS_FOLDER = "jobs"
StageState = AttemptState | Literal["pending"]
"""Pending: submitted to a scheduler, but no attempt has started."""
_METRICS = (  # of metrics.jsonl, by the names of their fields
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "host_memory_bytes",
    "gpu_memory_bytes",
)
_TAIL_BYTES = 1 << 16  # of metrics.jsonl, whose lines have about 300 bytes


@dataclass(frozen=True)
class StageReading:
    """The state of one stage. None means not recorded yet, or not applicable to this stage."""

    stage: str
    input_hash: str
    folder: str
    state: StageState
    job: str
    """Job number of the newest submission; empty without a scheduler."""
    attempts: int = 0
    attempt: str = ""
    """Label of the newest attempt, as in attempt.<label>; empty before the first."""
    started: str = ""
    """Start of the first attempt, ISO 8601; empty before it."""
    seconds: float = 0.0
    """Wall time over all attempts."""
    node: str = ""
    """Host of the newest attempt."""
    reason: str = ""
    """Why the newest attempt that failed or was interrupted ended; empty if the stage is done."""
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
    """Of a running stage: seconds since its last heartbeat."""
    host_memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None

    @property
    def restarts(self) -> int:
        return max(0, self.attempts - 1)


def is_run(folder: Path) -> bool:
    return (folder / RECIPE_FILE).is_file()


def check_run(folder: Path) -> None:
    """ValueError unless `folder` is a run folder."""
    if not is_run(folder):
        raise ValueError(f"{folder} is not a run folder; give one that `halo run` created, such as runs/demo")


def find_runs(folder: Path) -> list[Path]:
    """`folder` itself if it is a run folder, otherwise the run folders in it."""
    if is_run(folder):
        return [folder]
    return sorted(inner for inner in folder.iterdir() if is_run(inner)) if folder.is_dir() else []


def latest_of_each_stage(run: Path) -> list[StageStatus]:
    """The stages that have started, in the order of their first attempts.

    Of the folders of a stage, the one of the latest recipe of the run counts.
    """
    folder = RunFolder(run)
    planned = {record.folder for record in folder.planned()}
    found = (status for status in folder.status() if status.record.folder in planned)
    return sorted(found, key=_started)


def _started(status: StageStatus) -> tuple[str, float]:
    """Start of the first attempt: in whole seconds as recorded, then with the precision of the file system."""
    first = attempt_folders(status.record.folder)[0]
    return status.attempts[0].started, _modified(first / "started.json") or 0.0


def read_run(run: Path) -> list[StageReading]:
    """All stages that have started, then those only submitted. ValueError if `run` is not a run folder."""
    check_run(run)
    recipe = _recipe(run)
    started = [_read_stage(status, recipe) for status in latest_of_each_stage(run)]
    names = {stage.stage for stage in started}
    pending = [_pending(record, recipe) for record in submitted(run) if record.stage not in names]
    return started + sorted(pending, key=lambda stage: int(stage.job))


def submitted(run: Path) -> list[StageRecord]:
    """Stages of the latest recipe that were submitted to a scheduler."""
    return [record for record in RunFolder(run).planned() if job_numbers(record.folder)]


def job_numbers(stage_folder: Path) -> list[int]:
    """Job numbers of the submissions of a stage, oldest first."""
    notes = (path.stem for path in (stage_folder / JOBS_FOLDER).glob("*.json"))
    return sorted(int(name) for name in notes if name.isdecimal())


def _pending(record: StageRecord, recipe: dict[str, Any]) -> StageReading:
    return StageReading(
        stage=record.stage,
        input_hash=record.input_hash,
        folder=str(record.folder),
        state="pending",
        job=str(job_numbers(record.folder)[-1]),
        steps=_steps(recipe, record.stage),
    )


def _recipe(run: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load((run / RECIPE_FILE).read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_stage(status: StageStatus, recipe: dict[str, Any]) -> StageReading:
    folder, newest = status.record.folder, status.attempts[-1]
    runs = status.state == "running"
    metrics, tasks = last_metrics(folder), _read_progress(folder)
    steps = _steps(recipe, status.record.stage)
    saved, saved_at = newest_checkpoint(folder)
    beat_at = _modified(attempt_folders(folder)[-1] / "heartbeat")
    return StageReading(
        stage=status.record.stage,
        input_hash=status.record.input_hash,
        folder=str(folder),
        state=status.state,
        attempts=len(status.attempts),
        attempt=newest.label,
        job=next((str(number) for number in reversed(job_numbers(folder))), ""),
        started=status.attempts[0].started,
        seconds=status.seconds,
        node=newest.host,
        reason=_reason(status),
        steps=steps,
        **{field: metrics.get(field) for field in _METRICS},
        tasks_done=tasks.get("done"),
        tasks=tasks.get("total"),
        progress=_progress(status, metrics, steps, tasks),
        seconds_left=_seconds_left(metrics, steps, tasks) if runs else None,
        checkpoint_step=saved,
        checkpoint_age_seconds=_age(saved_at),
        heartbeat_age_seconds=_age(beat_at) if runs else None,
    )


def _reason(status: StageStatus) -> str:
    if status.state == "done":
        return ""
    return next((attempt.reason for attempt in reversed(status.attempts) if attempt.reason), "")


def last_metrics(stage_folder: Path) -> dict[str, Any]:
    """The last complete line of metrics.jsonl; empty for stages that do not train, or before the first step."""
    try:
        with open(stage_folder / METRICS_FILE, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        with suppress(ValueError):  # incomplete: being written, or cut short by a kill
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
    status: StageStatus, metrics: dict[str, Any], steps: int | None, tasks: dict[str, Any]
) -> float | None:
    if status.state == "done":
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
    names = (path.name.removeprefix("step-") for path in (stage_folder / CHECKPOINTS).glob("step-????????"))
    step = max((int(name) for name in names if name.isdecimal()), default=None)
    if step is None:
        return None, None
    return step, _modified(stage_folder / CHECKPOINTS / f"step-{step:08d}")


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # removed in the meantime
        return None


def _age(moment: float | None) -> float | None:
    """Seconds since `moment`; not negative, because the clock of the file server may be ahead of ours."""
    return None if moment is None else max(0.0, time.time() - moment)
