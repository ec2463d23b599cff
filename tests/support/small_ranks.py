"""A small training in several processes that a test may kill, stop or send signals to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from tests.support.fork_server import CONTEXT

STEPS, EVERY = 12, 3
SAVED = 2  # saves begin at its multiples


@dataclass(frozen=True)
class Job:
    """`layout` are fields of ParallelLayout. `write_seconds` stretches every background write, so that it can be hit;
    `step_seconds` every step. `stall_at` puts rank 0 to sleep for good before that step; the last rank's disk is full
    when it saves `unwritable_step`."""

    folder: str
    ranks: int = 2
    layout: Mapping[str, Any] = field(default_factory=dict)
    write_seconds: float = 0.0
    step_seconds: float = 0.0
    stall_at: int | None = None
    unwritable_step: int | None = None
    watchdog_seconds: float = 60.0
    meeting: str = ""


class World:
    """The processes of one job. `wait` gives their exit codes (negative: the signal that ended them)."""

    def __init__(self, job: Job):
        from tests.support import small_rank_main

        self.job = job
        self._processes = [
            CONTEXT.Process(target=small_rank_main.main, args=(job, rank)) for rank in range(job.ranks)
        ]
        for process in self._processes:
            process.start()
        self.pids = [process.pid or 0 for process in self._processes]

    def alive(self) -> list[int]:
        """Ranks that have not ended."""
        return [rank for rank, process in enumerate(self._processes) if process.exitcode is None]

    def wait(self, seconds: float = 120.0) -> list[int]:
        end = time.monotonic() + seconds
        while self.alive():
            assert time.monotonic() < end, f"ranks {self.alive()} still run: {self.errors()}"
            time.sleep(0.02)
        return [process.exitcode or 0 for process in self._processes]

    def send(self, rank: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def errors(self) -> list[str]:
        """What each rank wrote to stderr that is not chatter of libraries."""
        paths = [Path(self.job.folder) / f"stderr.{pid}" for pid in self.pids]
        texts = [path.read_text() if path.exists() else "" for path in paths]
        return ["\n".join(x for x in text.splitlines() if x.startswith("error:")) for text in texts]


class Ranks:
    """Starts worlds."""

    def __init__(self) -> None:
        self.worlds: list[World] = []

    def start(self, folder: Path, **settings: Any) -> World:
        folder.mkdir(parents=True, exist_ok=True)
        self.worlds.append(World(Job(str(folder), meeting=mkdtemp(dir=folder), **settings)))
        return self.worlds[-1]


@contextmanager
def ranks_to_kill() -> Iterator[Ranks]:
    """Worlds can be started while the block runs; what still lives at its end is killed."""
    ranks = Ranks()
    try:
        yield ranks
    finally:
        for world in ranks.worlds:
            world.kill()
