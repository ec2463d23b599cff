"""The local executor: runs what is not done, one stage after another, in this process.

It keeps nothing in memory that matters: kill it at any instant and the same call goes on from the files.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from halo_cluster.record import Attempt, StageRecord
from halo_cluster.storage import storage_sentence


@dataclass(frozen=True)
class StageResult:
    """What a stage made: files and folders inside its stage folder, and its own numbers (JSON values)."""

    outputs: Sequence[Path]
    summary: dict[str, Any]


@dataclass(frozen=True)
class PlannedStage:
    """A stage to bring about. `run` writes into `record.folder` and picks up what killed attempts left."""

    name: str
    record: StageRecord
    run: Callable[[Attempt], StageResult]
    depends_on: tuple[str, ...] = ()


class StageFailed(RuntimeError):
    """A stage ended in an error that is not the user's; the message names the stage and its log."""


class StopRequested(Exception):
    """A stage was asked to stop, has saved what it had, and ends unfinished; the message says by what and where."""


def run_stages(stages: Sequence[PlannedStage], console: Console) -> dict[str, dict[str, Any]]:
    """Bring every stage to DONE, in order; returns each stage's DONE.json by name.

    The caller holds the run folder. The first stage that does not finish ends the call: ValueError (a user
    error, as the stage raised it), StorageError, StageFailed, StopRequested, or KeyboardInterrupt. The next call
    resumes there.
    """
    width = max((len(stage.name) for stage in stages), default=0)
    published: dict[str, dict[str, Any]] = {}
    for stage in stages:
        assert all(name in published for name in stage.depends_on), (
            f"{stage.name} is planned before its inputs"
        )
        done = stage.record.done()
        if done is not None:
            _say(console, stage, width, "done", f"{_duration(done['seconds'])}, in an earlier run")
        else:
            done = _run_stage(stage, console, width)
        published[stage.name] = done
    return published


def _run_stage(stage: PlannedStage, console: Console, width: int) -> dict[str, Any]:
    attempt = stage.record.begin_attempt()
    earlier = sum(status.seconds for status in stage.record.attempts()[:-1])
    resumed = (
        f"attempt {attempt.number}, after {_duration(earlier)} of earlier ones" if attempt.number > 1 else ""
    )
    _say(console, stage, width, "running", resumed)
    try:
        with attempt.captured_logging():
            result = stage.run(attempt)
        done = attempt.publish(result.outputs, result.summary)
    except KeyboardInterrupt:
        attempt.interrupt("Ctrl-C")
        _say(console, stage, width, "interrupted", "the same command resumes here")
        raise
    except StopRequested as request:
        attempt.interrupt(str(request))
        _say(console, stage, width, "interrupted", "saved; the same command resumes here")
        raise
    except Exception as error:
        reason = _reason(stage.record.folder, error)
        with suppress(OSError):  # the disk may be what failed
            attempt.log(traceback.format_exc())
        attempt.fail(reason)
        _say(console, stage, width, "failed", "")
        if isinstance(error, ValueError):
            raise
        raise StageFailed(
            f"stage {stage.name} failed: {reason}; the traceback is in {attempt.log_path}"
        ) from error
    _say(console, stage, width, "done", _duration(done["seconds"]))
    return done


def _reason(folder: Path, error: Exception) -> str:
    """One line, without a full stop."""
    if isinstance(error, OSError) and error.errno is not None:
        return storage_sentence(folder, error)
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


_STYLES = {"done": "green", "running": "cyan", "interrupted": "yellow", "failed": "red"}


def _say(console: Console, stage: PlannedStage, width: int, state: str, remark: str) -> None:
    line = Text.assemble((f"{stage.name:<{width}}  ", ""), (f"{state:<12}", _STYLES[state]), remark)
    console.print(line, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
