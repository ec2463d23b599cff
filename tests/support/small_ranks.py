"""A small training in several processes that a test may kill, stop or send signals to.

Ranks are forked from a server that has torch and Megatron loaded already: a world starts in a second. Run as
`python -m tests.support.small_ranks` it is that server: one JSON job per line in, one process per rank.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

ROOT = Path(__file__).parents[2]
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

    def __init__(self, job: Job, server: subprocess.Popen[str]):
        self.job, self._server = job, server
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(asdict(job)) + "\n")
        server.stdin.flush()
        self.pids: list[int] = json.loads(server.stdout.readline())
        self._codes: dict[int, int] = {}

    def alive(self) -> list[int]:
        """Ranks that have not ended."""
        return [rank for rank in range(self.job.ranks) if self._code(rank) is None]

    def _code(self, rank: int) -> int | None:
        path = Path(self.job.folder) / f"code.{self.pids[rank]}"
        with suppress(FileNotFoundError, ValueError):
            return int(path.read_text())
        return None

    def wait(self, seconds: float = 120.0) -> list[int]:
        end = time.monotonic() + seconds
        while self.alive():
            assert time.monotonic() < end, f"ranks {self.alive()} still run: {self.errors()}"
            time.sleep(0.02)
        return [code for rank in range(self.job.ranks) if (code := self._code(rank)) is not None]

    def send(self, rank: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def errors(self) -> list[str]:
        """What each rank wrote to stderr that is not chatter of libraries."""
        texts = [(Path(self.job.folder) / f"stderr.{pid}").read_text() for pid in self.pids]
        return ["\n".join(x for x in text.splitlines() if x.startswith("error:")) for text in texts]


class Ranks:
    """Starts worlds; see `server`."""

    def __init__(self, server: subprocess.Popen[str]):
        self._server = server
        self._worlds: list[World] = []

    def start(self, folder: Path, **settings: Any) -> World:
        folder.mkdir(parents=True, exist_ok=True)
        world = World(Job(str(folder), meeting=mkdtemp(dir=folder), **settings), self._server)
        self._worlds.append(world)
        return world

    def kill_all(self) -> None:
        for world in self._worlds:
            for rank in world.alive():
                world.send(rank, signal.SIGKILL)


@contextmanager
def server() -> Iterator[Ranks]:
    """Worlds can be started while the block runs; what still lives at its end is killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.small_ranks"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    ranks = Ranks(process)
    try:
        yield ranks
    finally:
        ranks.kill_all()
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)


def _serve() -> None:
    import tests.support.small_rank_main as rank_main  # loads torch and Megatron once, for all ranks

    running: dict[int, Path] = {}

    def reap(*_: object) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                path = running.pop(ended[0])
                temporary = path.with_name(f"part.{ended[0]}")
                temporary.write_text(str(os.waitstatus_to_exitcode(ended[1])))
                temporary.rename(path)

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pids = []
        for rank in range(job.ranks):
            if not (pid := os.fork()):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
                rank_main.main(job, rank)
            pids.append(pid)
            running[pid] = Path(job.folder) / f"code.{pid}"
        print(json.dumps(pids), flush=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


if __name__ == "__main__":
    from tests.support.small_ranks import (
        _serve as serve,  # as the module that the ranks' pickles and types name
    )

    serve()
