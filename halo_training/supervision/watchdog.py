"""A thread per rank that ends the run when a rank hangs or is gone, and says which and where.

Training blocks in C code while it waits for another rank, so nobody else in the process could.
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
from types import TracebackType

import torch.distributed as dist

from halo_training.supervision.peers import PeerBoard

POLL_SECONDS = 1.0
# If not even this thread runs, for some C code keeps Python's lock, faulthandler's own thread ends the process.
_LOCKED_SECONDS = 30.0
_FAREWELL_SECONDS = 3.0
EXIT_CODE = 1


class Watchdog:
    """Ends this process when no step was finished for `limit` seconds, here or in another rank, or when a rank is gone.

    Stacks of all threads go to `folder`/stacks.rank-<n>.txt, one sentence to stderr and to `on_end`. Time in which
    this process was stopped (a suspended job) does not count.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=_FAREWELL_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        Path(self._stacks.name).unlink()

    def progress(self, step: int | None = None) -> None:
        """Called by the training loop when it begins and whenever it has got on; `step` counts finished steps. Before
        the first call (a checkpoint is read for as long as it takes) only the other ranks are watched."""
        self._step = self._step if step is None else step
        self._idle = 0.0

    def lost_peers(self, patience: float = _FAREWELL_SECONDS) -> str:
        """Names of the ranks that are gone, waiting a little for the news; "" if none is known."""
        end = time.monotonic() + patience
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
        silent = [
            str(peer) for peer in (self._board.peers if self._board else []) if peer.silent > 3 * POLL_SECONDS
        ]
        culprits = f"; {', '.join(silent)} does not answer" if silent else ""
        return (
            f"{self.title}: no progress for {self.limit:g} s after step {self._step} on rank {self._rank}"
            f"{culprits}"
        )

    def _peer_verdict(self, passed: float) -> str:
        if self._board is None:
            return ""
        try:
            self._board.beat(self._step)
            self._board.look(passed)
            if known := self._board.verdict():
                return known.partition(":")[2]
            lost = self._board.lost()
        except (RuntimeError, dist.DistError):
            # The store went with the process that held it. If training notices too, its sentence comes first.
            self._ended.wait(_FAREWELL_SECONDS)
            return f"{self.title}: lost the process that the ranks meet at, rank 0 or its launcher"
        names = ", ".join(map(str, lost))
        # Training is told by its own connections, as a rule; a GPU waits for a dead peer without end.
        if lost and not self._ended.wait(_FAREWELL_SECONDS):
            return f"{self.title}: {names} has ended or does not answer"
        return ""

    def _end(self, verdict: str) -> None:
        speaks = True
        if self._board is not None:
            with suppress(RuntimeError, dist.DistError):
                speaker, _, verdict = self._board.announce(f"{self._rank}:{verdict}").partition(":")
                speaks = int(speaker) == self._rank
        faulthandler.dump_traceback(file=self._stacks)
        self._stacks.flush()
        sentence = (
            f"{verdict}; the stacks of all ranks are in {self.folder}; the same command resumes from the last "
            "checkpoint"
        )
        with suppress(OSError, ValueError):
            if self._on_end is not None:
                self._on_end(sentence)
        if speaks:
            os.write(2, f"error: {sentence}\n".encode())
            sys.stdout.flush()
        if self._rank == 0:
            # The others learn of it through the store, which may live here.
            time.sleep(_FAREWELL_SECONDS)
        os._exit(EXIT_CODE)
