"""The logs of the attempts of a stage: printed once, or followed across attempts."""

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

POLL_SECONDS = 0.5


def stage_record(run: Path, stage: str) -> StageRecord:
    """The newest record of `stage`. ValueError, with the known stages, if it was neither started nor submitted."""
    check_run(run)
    started = {status.record.stage: status.record for status in latest_of_each_stage(run)}
    if stage in started:
        return started[stage]
    for record in submitted(run):
        if record.stage == stage:
            return record
    raise ValueError(f"{run} has not started {stage!r}; started are: {', '.join(started) or 'none yet'}")


@dataclass
class _Tail:
    """A growing file. `lines` returns the complete lines added since its last call."""

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
        """The text after the last newline, for a file that no longer grows."""
        rest, self.rest = self.rest, b""
        return [rest.decode(errors="replace")] if rest else []


def _files(attempt: Path) -> list[Path]:
    """log.txt, then the logs of the ranks in order."""
    ranks = sorted(attempt.glob("rank-*.txt"), key=lambda path: (len(path.name), path.name))
    return [attempt / "log.txt", *ranks]


def _job_files(stage_folder: Path) -> list[Path]:
    """The output of the newest job as the scheduler stored it, one file per node."""
    numbers = job_numbers(stage_folder)
    if not numbers:
        return []
    return sorted((stage_folder / JOBS_FOLDER).glob(f"{numbers[-1]}_*_log.*"))


@dataclass
class StageLog:
    """The log of the newest attempt, or the scheduler's log of a job that has not started an attempt."""

    record: StageRecord
    _tails: dict[Path, _Tail] = field(default_factory=dict)
    _last_printed: Path | None = None
    _ended: set[Path] = field(default_factory=set)

    def read(self) -> Iterator[str]:
        """All lines of the newest attempt so far, with a heading for each file."""
        attempts = attempt_folders(self.record.folder)
        yield from self._added(attempts[-1:], final=True)
        if self._is_done():
            yield f"== {self.record.stage} done"

    def follow(self) -> Iterator[str]:
        """Lines of the newest attempt and of all later ones, until the stage is done."""
        earlier = set(attempt_folders(self.record.folder)[:-1])
        while True:
            done = self._is_done()  # read first, so that everything logged before is read below
            attempts = [folder for folder in attempt_folders(self.record.folder) if folder not in earlier]
            yield from self._added(attempts, final=done)
            if done:
                yield f"== {self.record.stage} done"
                return
            time.sleep(POLL_SECONDS)

    def _is_done(self) -> bool:
        return (self.record.folder / DONE_FILE).exists()

    def _added(self, attempts: list[Path], *, final: bool) -> Iterator[str]:
        if not attempts:
            yield from self._lines("the scheduler's log", _job_files(self.record.folder), final)
        for folder in attempts:
            if folder in self._ended:
                continue
            status = AttemptStatus.read(folder)  # read first, so that everything logged before its end is read below
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
            if lines and path != self._last_printed:
                self._last_printed = path
                yield f"== {title}: {path.name}"
            yield from lines
