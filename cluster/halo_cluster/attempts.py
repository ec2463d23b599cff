"""What an attempt's files say after it, or while another process runs it.

attempt.<label>/started.json   host, pid, command line, time
                heartbeat      seconds of work so far, rewritten every second
                log.txt        log lines, and the traceback of a failure
                exit.json      outcome, reason, seconds, host; absent while it runs and after kill -9
                room           empty space, given back before the last words, so that a full disk has some for them

The label is a number where a run's own process works (1, 2, ...), job and restart under a scheduler (1234.0, 1234.1).
Both count upwards, so attempts are in order whatever the clocks of the machines say.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from durable_files import publish_once, read_json, write_bytes
from halo_cluster.heartbeat import last_heartbeat
from halo_cluster.processes import ProcessIdentity

AttemptState = Literal["running", "done", "failed", "interrupted"]
KILLED = "killed, or the machine stopped"


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


_FOLDER = re.compile(r"attempt\.(\d+(?:\.\d+)?)")


def attempt_label(folder: Path) -> str:
    match = _FOLDER.fullmatch(folder.name)
    assert match, folder
    return match[1]


def _order(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in attempt_label(folder).split("."))


def attempt_folders(stage_folder: Path) -> list[Path]:
    """The attempts of a stage, oldest first."""
    found = stage_folder.glob("attempt.*")
    return sorted((folder for folder in found if _FOLDER.fullmatch(folder.name)), key=_order)


def next_label(stage_folder: Path) -> str:
    """Of the next attempt by a run's own process."""
    taken = attempt_folders(stage_folder)
    return str(_order(taken[-1])[0] + 1) if taken else "1"


_ROOM, _ROOM_BYTES = "room", 1 << 14


def keep_room(folder: Path) -> None:
    """Hold some space for what is to be said at the end."""
    write_bytes(folder / _ROOM, os.urandom(_ROOM_BYTES))  # nothing that a file system could make smaller


def use_room(folder: Path) -> None:
    (folder / _ROOM).unlink(missing_ok=True)


def write_exit(
    folder: Path,
    outcome: AttemptState,
    reason: str,
    seconds: float,
    *,
    host: str = "",
    final: bool = False,
) -> None:
    """Say how an attempt ended; what was said first stands. `host` is where it went wrong.

    `final`: it is for the user to begin another one, after an error of theirs or a stop that they asked for.
    """
    content = {
        "outcome": outcome,
        "reason": reason,
        "seconds": round(seconds, 3),
        "ended": utc_now(),
        "host": host,
        "final": final,
    }
    use_room(folder)
    publish_once(folder / "exit.json", content)


def close_abandoned(folder: Path, reason: str = KILLED) -> None:
    """Say it for an attempt that could not. The caller knows that nobody runs it any more."""
    if not (folder / "exit.json").exists():
        begun = _read_if_there(folder / "started.json")
        seconds = last_heartbeat(folder / "heartbeat")
        write_exit(folder, "interrupted", reason, seconds, host=begun.get("host", ""))


@dataclass(frozen=True)
class AttemptStatus:
    """One attempt. `started` is ISO 8601, empty if it was killed before saying so; `seconds` is wall time.

    `failed_on` is the host where it went wrong, if that is known; `final` leaves another try to the user.
    """

    label: str
    state: AttemptState
    started: str
    host: str
    pid: int
    seconds: float
    reason: str
    failed_on: str
    final: bool

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
            label=attempt_label(folder),
            state=end["outcome"],
            started=begun.get("started", ""),
            host=begun.get("host", ""),
            pid=begun.get("pid", 0),
            seconds=end["seconds"],
            reason=end["reason"],
            failed_on=end.get("host", ""),
            final=end.get("final", False),
        )


def _read_if_there(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.exists() else {}
