"""The local executor: runs the stages that are not done, one after another, in this process.

All its state is in files: it can be killed at any time, and the same call continues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from halo_cluster.execution import StageResult, StopRequested, execute_attempt
from halo_cluster.record import Attempt, StageRecord
from terminal_output import duration


@dataclass(frozen=True)
class PlannedStage:
    """A stage to run. `run` writes into `record.folder` and continues from what earlier attempts left there."""

    name: str
    record: StageRecord
    run: Callable[[Attempt], StageResult]
    depends_on: tuple[str, ...] = ()


def run_stages(stages: Sequence[PlannedStage], console: Console) -> dict[str, dict[str, Any]]:
    """Bring every stage to DONE, in order; returns each stage's DONE.json by name.

    The caller holds the run folder. The first stage that does not finish ends the call with ValueError (a user
    error, as the stage raised it), StorageError, StageFailed, StopRequested, or KeyboardInterrupt. The next call
    resumes that stage.
    """
    width = max((len(stage.name) for stage in stages), default=0)
    published: dict[str, dict[str, Any]] = {}
    for stage in stages:
        assert all(name in published for name in stage.depends_on), (
            f"{stage.name} is planned before its inputs"
        )
        done = stage.record.done()
        if done is not None:
            stage.record.cleanup()
            _say(console, stage, width, "done", f"{duration(done['seconds'])}, in an earlier run")
        else:
            done = _run_stage(stage, console, width)
        published[stage.name] = done
    return published


def _run_stage(stage: PlannedStage, console: Console, width: int) -> dict[str, Any]:
    attempt = stage.record.begin_attempt()
    earlier = stage.record.attempts()[:-1]
    spent = duration(sum(status.seconds for status in earlier))
    resumed = f"attempt {len(earlier) + 1}, after {spent} in earlier ones" if earlier else ""
    _say(console, stage, width, "running", resumed)
    try:
        done = execute_attempt(stage.name, attempt, stage.run)
    except (KeyboardInterrupt, StopRequested) as request:
        saved = "saved; " if isinstance(request, StopRequested) else ""
        _say(console, stage, width, "interrupted", f"{saved}the same command resumes here")
        raise
    except Exception:
        _say(console, stage, width, "failed", "")
        raise
    _say(console, stage, width, "done", duration(done["seconds"]))
    return done


_STYLES = {"done": "green", "running": "cyan", "interrupted": "yellow", "failed": "red"}


def _say(console: Console, stage: PlannedStage, width: int, state: str, remark: str) -> None:
    line = Text.assemble((f"{stage.name:<{width}}  ", ""), (f"{state:<12}", _STYLES[state]), remark)
    console.print(line, soft_wrap=True)
