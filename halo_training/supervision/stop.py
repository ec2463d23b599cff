"""Requests to save and stop: a signal to any rank, or a file in the stage folder."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

STOP_FILE = "stop"
# A scheduler may signal every process of a job, and a launcher passes on what it got: so near, it is one request.
REPEAT_SECONDS = 3.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequests:
    """Remembers that this rank was asked to stop. The trainer shares `code` with the other ranks at every step."""

    def __init__(self, folder: Path):
        self.file = folder / STOP_FILE
        self._signal = 0
        self._asked: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """While the block runs, SIGTERM and SIGUSR2 are requests. Asked again later, they do what they did before."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._asked.setdefault(number, now) < REPEAT_SECONDS:
            self._signal = number
            return
        signal.signal(number, self._before[number])
        signal.raise_signal(number)

    def code(self) -> int:
        """0: go on; 1: the file is there; else the number of the signal."""
        return self._signal or int(self.file.exists())

    def forget_file(self) -> None:
        """The request was met: the file must not stop the next attempt as well."""
        with suppress(FileNotFoundError):
            self.file.unlink()

    @staticmethod
    def is_by_file(code: int) -> bool:
        return code == 1

    def reason(self, code: int) -> str:
        return f"the file {self.file}" if self.is_by_file(code) else signal.Signals(code).name
