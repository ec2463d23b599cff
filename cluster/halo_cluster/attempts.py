"""What an attempt's files say after it, or while another process runs it.

attempt.<n>/started.json   host, pid, command line, time
            heartbeat      seconds of work so far, rewritten every second
            log.txt        log lines, and the traceback of a failure
            exit.json      outcome, reason, seconds; absent while it runs and after kill -9
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from durable_files import publish_once, read_json
from halo_cluster.heartbeat import last_heartbeat
from halo_cluster.processes import ProcessIdentity

AttemptState = Literal["running", "done", "failed", "interrupted"]
KILLED = "killed, or the machine stopped"


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def attempt_number(folder: Path) -> int:
    return int(folder.name.partition(".")[2])


def attempt_folders(stage_folder: Path) -> list[Path]:
    """The attempts of a stage, oldest first."""
    found = stage_folder.glob("attempt.*")
    return sorted((f for f in found if f.name.partition(".")[2].isdecimal()), key=attempt_number)


def write_exit(folder: Path, outcome: AttemptState, reason: str, seconds: float) -> None:
    """Say how an attempt ended; what was said first stands."""
    content = {"outcome": outcome, "reason": reason, "seconds": round(seconds, 3), "ended": utc_now()}
    publish_once(folder / "exit.json", content)


def close_abandoned(folder: Path) -> None:
    """Say it for an attempt that could not. The caller knows that nobody runs it any more."""
    if not (folder / "exit.json").exists():
        write_exit(folder, "interrupted", KILLED, last_heartbeat(folder / "heartbeat"))


@dataclass(frozen=True)
class AttemptStatus:
    """One attempt. `started` is ISO 8601, empty if it was killed before saying so; `seconds` is wall time."""

    number: int
    state: AttemptState
    started: str
    host: str
    pid: int
    seconds: float
    reason: str

    @classmethod
    def read(cls, folder: Path) -> AttemptStatus:
        """An attempt without exit.json counts as running unless its process has certainly ended."""
        begun = _read_if_there(folder / "started.json")
        end = _read_if_there(folder / "exit.json")
        if not end:
            gone = not begun or ProcessIdentity.from_json(begun).has_ended()
            seconds = last_heartbeat(folder / "heartbeat")
            outcome, reason = ("interrupted", KILLED) if gone else ("running", "")
            end = {"outcome": outcome, "reason": reason, "seconds": seconds}
        return cls(
            number=attempt_number(folder),
            state=end["outcome"],
            started=begun.get("started", ""),
            host=begun.get("host", ""),
            pid=begun.get("pid", 0),
            seconds=end["seconds"],
            reason=end["reason"],
        )


def _read_if_there(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.exists() else {}
