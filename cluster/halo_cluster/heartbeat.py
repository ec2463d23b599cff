"""A small file that a running attempt rewrites every second, so that its working time is known after kill -9."""

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
        """Wall time since the start, by the monotonic clock."""
        return time.monotonic() - self._clock_start

    def beat(self) -> None:
        """Overwrite the file in place with one short write. It is not flushed; a torn write reads as no beat."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, f"{self.seconds:15.3f}\n".encode(), 0)
        finally:
            os.close(descriptor)

    def stop(self) -> None:
        self._stopped.set()

    def _beat_until_stopped(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the stage fails by itself where a full disk loses something
                self.beat()


def last_heartbeat(path: Path) -> float:
    """Seconds at the last beat; 0 if there was none, or if power was lost while it was written."""
    try:
        return float(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0.0
