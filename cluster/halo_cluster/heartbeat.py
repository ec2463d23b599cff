"""A small file that a living attempt rewrites, so that after kill -9 its working time is still known."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

HEARTBEAT_SECONDS = 1.0


class Heartbeat:
    """Writes the seconds since its creation to `path`, at once and then every second, until stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clock_start = time.monotonic()
        self._stopped = threading.Event()
        self.beat()
        threading.Thread(target=self._beat_until_stopped, name="heartbeat", daemon=True).start()

    @property
    def seconds(self) -> float:
        """Wall time since the start, by a clock that nobody sets."""
        return time.monotonic() - self._clock_start

    def beat(self) -> None:
        """One write of fixed length in place: a beat is worth no fsync, and a torn one reads as none."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, f"{self.seconds:15.3f}\n".encode(), 0)
        finally:
            os.close(descriptor)

    def stop(self) -> None:
        self._stopped.set()

    def _beat_until_stopped(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # a full disk is for the stage to report, where it loses something
                self.beat()


def last_heartbeat(path: Path) -> float:
    """Seconds at the last beat; 0 when it was killed before the first, or power was lost during one."""
    try:
        return float(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0.0
