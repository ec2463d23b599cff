"""Runs one attempt at a stage, and records how it ended."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halo_cluster.record import Attempt
from halo_cluster.storage import storage_sentence


@dataclass(frozen=True)
class StageResult:
    """What a stage made: files and folders inside its stage folder, and its own numbers (JSON values)."""

    outputs: Sequence[Path]
    summary: dict[str, Any]


class StageFailed(RuntimeError):
    """A stage ended in an error that is not the user's; the message names the stage and its log."""


class StopRequested(Exception):
    """A stage was asked to stop, has saved its state, and ends unfinished; the message says by whom and where.

    `by_user`: the request was no signal, which a scheduler may have sent. Only the user starts the stage again.
    """

    def __init__(self, message: str, *, by_user: bool = False) -> None:
        super().__init__(message)
        self.by_user = by_user


def execute_attempt(name: str, attempt: Attempt, run: Callable[[Attempt], StageResult]) -> dict[str, Any]:
    """Run the stage `name` and publish what it made; returns DONE.json.

    If it does not finish, the attempt records why, and this function raises ValueError (a user error, as the stage
    raised it), StorageError, StageFailed, StopRequested, or KeyboardInterrupt.
    """
    try:
        with attempt.captured_logging():
            result = run(attempt)
        return attempt.publish(result.outputs, result.summary)
    except (KeyboardInterrupt, StopRequested) as request:
        attempt.end("interrupted", str(request) or "Ctrl-C", final=getattr(request, "by_user", False))
        raise
    except Exception as error:
        reason = _reason(attempt.record.folder, error)
        with suppress(OSError):  # the disk may be what failed
            attempt.log(traceback.format_exc())
        host = getattr(error, "host", socket.gethostname())
        attempt.end("failed", reason, host=host, final=isinstance(error, ValueError))
        if isinstance(error, ValueError):
            raise
        raise StageFailed(f"stage {name} failed: {reason}; the traceback is in {attempt.log_path}") from error


def _reason(folder: Path, error: Exception) -> str:
    """One line, without a full stop."""
    if isinstance(error, OSError) and error.errno is not None:
        return storage_sentence(folder, error)
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
