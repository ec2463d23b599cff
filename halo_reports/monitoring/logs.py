"""What a stage's attempts have logged: once, or as it comes, across attempts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from halo_cluster import AttemptStatus, StageRecord
from halo_cluster.attempts import attempt_folders
from halo_cluster.record import DONE_FILE
from halo_reports.monitoring.readings import (
    JOBS_FOLDER,
    check_run,
    job_numbers,
    latest_of_each_stage,
    submitted,
)

LOOK_SECONDS = 0.5


def stage_record(run: Path, stage: str) -> StageRecord:
    """The folder of `stage` that counts. ValueError, with those that were, if it was neither begun nor submitted."""
    check_run(run)
    begun = {row.record.stage: row.record for row in latest_of_each_stage(run)}
    if stage in begun:
        return begun[stage]
    for record in submitted(run):
        if record.stage == stage:
            return record
    there = ", ".join(begun) or "none yet"
    raise ValueError(f"{run} has begun no stage {stage!r}; begun are: {there}")


@dataclass
class _Tail:
    """A file that grows. Each call of `lines` returns what was added since, cut at the last whole line."""

    path: Path
    offset: int = 0
    rest: bytes = b""

    def lines(self) -> list[str]:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                added = file.read()
        except FileNotFoundError:
            return []
        self.offset += len(added)
        *whole, self.rest = (self.rest + added).split(b"\n")
        return [line.decode(errors="replace") for line in whole]

    def last_line(self) -> list[str]:
        """What follows the last line end, when nobody writes any more."""
        rest, self.rest = self.rest, b""
        return [rest.decode(errors="replace")] if rest else []


def _files(attempt: Path) -> list[Path]:
    """log.txt, then the ranks' in order."""
    ranks = sorted(attempt.glob("rank-*.txt"), key=lambda path: (len(path.name), path.name))
    return [attempt / "log.txt", *ranks]


def _job_files(stage_folder: Path) -> list[Path]:
    """What the newest job printed, node by node, as the scheduler keeps it."""
    numbers = job_numbers(stage_folder)
    if not numbers:
        return []
    return sorted((stage_folder / JOBS_FOLDER).glob(f"{numbers[-1]}_*_log.*"))


@dataclass
class StageLog:
    """The newest attempt's log; of a job that began no attempt, what the scheduler has kept of it."""

    record: StageRecord
    _tails: dict[Path, _Tail] = field(default_factory=dict)
    _spoke_last: Path | None = None
    _ended: set[Path] = field(default_factory=set)

    def read(self) -> Iterator[str]:
        """All there is now of the newest attempt, line by line, with a heading for each file."""
        attempts = attempt_folders(self.record.folder)
        yield from self._added(attempts[-1:], final=True)
        if self._is_done():
            yield f"== {self.record.stage} done"

    def follow(self) -> Iterator[str]:
        """What there is, then what comes, until the stage is done; attempts that begin meanwhile are told apart."""
        earlier = set(attempt_folders(self.record.folder)[:-1])
        while True:
            done = self._is_done()  # asked first: what was logged before is then read below
            attempts = [folder for folder in attempt_folders(self.record.folder) if folder not in earlier]
            yield from self._added(attempts, final=done)
            if done:
                yield f"== {self.record.stage} done"
                return
            time.sleep(LOOK_SECONDS)

    def _is_done(self) -> bool:
        return (self.record.folder / DONE_FILE).exists()

    def _added(self, attempts: list[Path], *, final: bool) -> Iterator[str]:
        if not attempts:
            yield from self._lines("the scheduler's log", _job_files(self.record.folder), final)
        for folder in attempts:
            if folder in self._ended:
                continue
            status = AttemptStatus.read(folder)  # first: what it logged before its end is then read below
            title, over = f"attempt {status.label}", status.state != "running"
            yield from self._lines(f"{title} on {status.host}", _files(folder), final or over)
            if over:
                self._ended.add(folder)
            if status.state in ("failed", "interrupted"):
                yield f"== {title} {status.state}: {status.reason}"

    def _lines(self, title: str, files: list[Path], final: bool) -> Iterator[str]:
        for path in files:
            tail = self._tails.setdefault(path, _Tail(path))
            lines = tail.lines() + (tail.last_line() if final else [])
            if lines and path != self._spoke_last:
                self._spoke_last = path
                yield f"== {title}: {path.name}"
            yield from lines
