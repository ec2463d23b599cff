"""A thread in each rank that ends the run when a rank hangs or is gone, and says which rank and where.

It has to be a thread: training blocks in C code while it waits for another rank.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from halo_training.supervision.peers import PeerBoard

POLL_SECONDS = 1.0
# If C code holds Python's lock this thread cannot run; then faulthandler's own thread ends the process, so much later.
_LOCKED_SECONDS = 30.0
_ERROR_PROPAGATION_SECONDS = 3.0


class Watchdog:
    """Ends this process when a rank has finished no step for `limit` seconds, or when a rank is gone.

    Writes the stacks of all threads to `folder`/stacks.rank-<n>.txt, and one sentence to stderr and to `on_end`. Time
    in which this process was stopped (a suspended job) does not count.
    """

    def __init__(self, title: str, limit: float, folder: Path, on_end: Callable[[str], None] | None = None):
        self.title, self.limit, self.folder, self._on_end = title, limit, folder, on_end
        self._step, self._idle = 0, -math.inf
        self._ended = threading.Event()
        self._board: PeerBoard | None = None

    def __enter__(self) -> Watchdog:
        self._rank = dist.get_rank()
        if dist.get_world_size() > 1:
            self._board = PeerBoard(self._rank)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stacks = open(self.folder / f"stacks.rank-{self._rank}.txt", "w")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join(timeout=_ERROR_PROPAGATION_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        Path(self._stacks.name).unlink()

    def progress(self, step: int | None = None) -> None:
        """The training loop calls this when it begins and whenever it has made progress; `step` counts finished steps.
        Until the first call only the other ranks are watched, because reading a checkpoint may take any time."""
        self._step = self._step if step is None else step
        self._idle = 0.0

    def lost_peers(self) -> str:
        """Names of the ranks that are gone. Waits a few seconds for one to be known, then returns ""."""
        end = time.monotonic() + _ERROR_PROPAGATION_SECONDS
        while self._board is not None and time.monotonic() < end:
            if lost := self._board.lost():
                return ", ".join(map(str, lost))
            time.sleep(0.1)
        return ""

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            if self._idle >= 0.0:
                faulthandler.dump_traceback_later(self.limit + _LOCKED_SECONDS, exit=True, file=self._stacks)
            now = time.monotonic()
            passed, last = min(now - last, 2 * POLL_SECONDS), now
            self._idle += passed
            verdict = self._idle_verdict() or self._peer_verdict(passed)
            if verdict and not self._ended.is_set():
                self._end(verdict)

    def _idle_verdict(self) -> str:
        if self._idle < self.limit:
            return ""
        peers = self._board.peers if self._board else []
        silent = [str(peer) for peer in peers if peer.silent > 3 * POLL_SECONDS]
        culprits = f"; {', '.join(silent)} does not answer" if silent else ""
        return (
            f"{self.title}: no progress for {self.limit:g} s after step {self._step} on rank {self._rank}"
            f"{culprits}"
        )

    def _peer_verdict(self, passed: float) -> str:
        if self._board is None:
            return ""
        try:
            self._board.beat()
            self._board.look(passed)
            if known := self._board.verdict():
                return known.partition(":")[2]
            lost = self._board.lost()
        except (RuntimeError, dist.DistError):
            # The store is gone with the rank that held it. If training notices too, its own sentence is better.
            self._ended.wait(_ERROR_PROPAGATION_SECONDS)
            return f"{self.title}: rank 0, which holds the store of the process group, is gone"
        names = ", ".join(map(str, lost))
        # Training learns it from its own connections, as a rule; a GPU waits for a dead peer forever.
        if lost and not self._ended.wait(_ERROR_PROPAGATION_SECONDS):
            return f"{self.title}: {names} has ended or does not answer"
        return ""

    def _end(self, verdict: str) -> None:
        reports = True
        if self._board is not None:
            with suppress(RuntimeError, dist.DistError):
                reporter, _, verdict = self._board.announce(f"{self._rank}:{verdict}").partition(":")
                reports = int(reporter) == self._rank
        faulthandler.dump_traceback(file=self._stacks)
        self._stacks.flush()
        sentence = (
            f"{verdict}; the stacks of all ranks are in {self.folder}; the same command resumes from the last "
            "checkpoint"
        )
        with suppress(OSError, ValueError):
            if self._on_end is not None:
                self._on_end(sentence)
        if reports:
            os.write(2, f"error: {sentence}\n".encode())
            sys.stdout.flush()
        if self._rank == 0:
            # The others read the verdict from the store, which may live in this process.
            time.sleep(_ERROR_PROPAGATION_SECONDS)
        os._exit(1)
