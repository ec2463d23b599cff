"""Requests to save and stop: a signal to any rank, or a file in the stage folder."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halo_cluster.signals import on_stop_request

STOP_FILE = "stop"
BY_FILE = 1


class StopRequests:
    """Remembers that this rank was asked to stop. The trainer shares `code` with the other ranks after every step."""

    def __init__(self, folder: Path):
        self.file = folder / STOP_FILE
        self._signal = 0

    @contextmanager
    def accepted(self) -> Iterator[None]:
        """While the block runs, SIGTERM and SIGUSR2 are requests."""

        def remember(number: signal.Signals) -> None:
            self._signal = number

        with on_stop_request(remember):
            yield

    def code(self) -> int:
        """0: continue; BY_FILE: the file exists; else the number of the signal."""
        return self._signal or int(self.file.exists())

    def reason(self, code: int) -> str:
        return f"the file {self.file}" if code == BY_FILE else signal.Signals(code).name
