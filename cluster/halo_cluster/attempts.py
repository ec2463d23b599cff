"""The files of an attempt: one try at a stage, by one process or by several ranks.

attempt.<label>/started.json     host, pid, command line and time of the process that runs the attempt
                heartbeat        seconds of work so far, rewritten every second (heartbeat.py)
                log.txt          log lines, and the traceback of a failure
                exit.json        how the attempt ended (ExitReport); absent while it runs, and after kill -9
                reserved         empty space, released before the end is written, so that a full disk can hold it

Of a stage that runs in several ranks also:

                work.json        what the ranks have to do
                rendezvous.json  host and port at which rank 0 listens
                rank-<k>.json    how rank k ended (ExitReport), by that rank, or by its parent if the rank could not
                rank-<k>.txt     what rank k printed and logged
                stacks.rank-<k>.txt  the Python stacks of a rank that the watchdog ended

The label is a number (1, 2, ...) for attempts by `halo run` itself, and job and restart (1234.0, 1234.1) under a
scheduler. Both count upwards, so attempts are in order whatever the clocks of the machines say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from durable_files import ProcessIdentity, publish_once, read_json, write_bytes
from halo_cluster.heartbeat import last_heartbeat

AttemptState = Literal["running", "done", "failed", "interrupted"]
ExitState = Literal["done", "failed", "interrupted", "lost", "affected"]
KILLED = "killed, or the machine stopped"


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class ExitReport:
    """How an attempt or one of its ranks ended. It is published once: the first report stands.

    `state` of a rank may also be "lost" (it ended without a report: killed, or crashed) or "affected" (it ended because
    of another rank). `host` is where the fault is, "" if that is unknown. `final` leaves the next attempt to the user:
    after an error of theirs, or a stop that they asked for. `seconds` is working time. `result` is what rank 0 made.
    """

    state: ExitState
    reason: str = ""
    host: str = ""
    final: bool = False
    seconds: float = 0.0
    rank: int | None = None
    traceback: str = ""
    result: Any = None
    ended: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))

    def publish(self, path: Path) -> bool:
        """False if `path` has a report already."""
        return publish_once(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> ExitReport | None:
        if not path.exists():
            return None
        try:
            return cls(**read_json(path))
        except TypeError:
            run = path.parents[3]
            raise ValueError(f"{path} is from another version of halo; remove {run} to run it again") from None


_CAUSES = ("lost", "failed", "interrupted", "affected")


def rank_report_path(attempt: Path, rank: int) -> Path:
    return attempt / f"rank-{rank}.json"


def rank_reports(attempt: Path, ranks: Iterable[int]) -> list[ExitReport]:
    """The reports that these ranks or their parents have published so far."""
    found = (ExitReport.read(rank_report_path(attempt, rank)) for rank in ranks)
    return [report for report in found if report is not None]


def cause(reports: Iterable[ExitReport]) -> ExitReport | None:
    """The report of the rank at fault: a lost rank before one that failed, one that was asked to stop before one that
    was affected, and the earliest of several. None if every rank is done."""
    unfinished = [report for report in reports if report.state != "done"]
    return min(unfinished, key=lambda report: (_CAUSES.index(report.state), report.ended), default=None)


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
    """The label of the next attempt by `halo run` itself."""
    taken = attempt_folders(stage_folder)
    return str(_order(taken[-1])[0] + 1) if taken else "1"


_RESERVED, _RESERVED_BYTES = "reserved", 1 << 16


def reserve_space(folder: Path) -> None:
    """Hold the disk space that the reports at the end of an attempt will need."""
    write_bytes(folder / _RESERVED, os.urandom(_RESERVED_BYTES))  # random: a file system cannot compress it


def release_space(folder: Path) -> None:
    (folder / _RESERVED).unlink(missing_ok=True)


def close_abandoned(folder: Path, reason: str = KILLED) -> None:
    """Write exit.json of an attempt that could not. The caller knows that no process runs it any more.

    If its ranks had stopped on request before it was killed, their report is the reason.
    """
    if not (folder / "exit.json").exists():
        ranks = (ExitReport.read(path) for path in folder.glob("rank-*.json"))
        end = cause(report for report in ranks if report is not None)
        if end is not None and end.state == "interrupted":
            reason = end.reason
        begun = _read_if_there(folder / "started.json")
        seconds = last_heartbeat(folder / "heartbeat")
        release_space(folder)
        ExitReport("interrupted", reason, begun.get("host", ""), seconds=seconds).publish(folder / "exit.json")


@dataclass(frozen=True)
class AttemptStatus:
    """One attempt. `started` is ISO 8601, empty if it was killed before it could write that; `seconds` is wall time.

    `failed_on` is the host where it went wrong, if that is known; `final` leaves the next attempt to the user.
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
        state: AttemptState = "running"
        end = ExitReport.read(folder / "exit.json")
        if end is None:
            seconds = last_heartbeat(folder / "heartbeat")
            ended = not begun or ProcessIdentity.from_json(begun).has_ended()
            end = ExitReport("interrupted", KILLED if ended else "", seconds=seconds)
            state = "interrupted" if ended else "running"
        else:
            assert end.state in ("done", "failed", "interrupted"), folder
            state = end.state
        return cls(
            label=attempt_label(folder),
            state=state,
            started=begun.get("started", ""),
            host=begun.get("host", ""),
            pid=begun.get("pid", 0),
            seconds=end.seconds,
            reason=end.reason,
            failed_on=end.host,
            final=end.final,
        )


def _read_if_there(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.exists() else {}
