"""Identifies a process, so that a pid in a file is not mistaken for a later process with the same number."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _birth(pid: int) -> str | None:
    """A value that distinguishes this process from any other with the same pid; None if it has ended or is a zombie.

    The value is the boot id and the start time in clock ticks since boot, which do not change when the clock is set.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start_ticks = fields[0], fields[19]
    return None if state in "ZX" else f"{_BOOT_ID.read_text().strip()}:{start_ticks}"


@dataclass(frozen=True)
class ProcessIdentity:
    """One process on one host."""

    host: str
    pid: int
    birth: str

    @classmethod
    def current(cls) -> ProcessIdentity:
        birth = _birth(os.getpid())
        assert birth is not None
        return cls(socket.gethostname(), os.getpid(), birth)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ProcessIdentity:
        return cls(str(content["host"]), int(content["pid"]), str(content["birth"]))

    @property
    def is_on_this_host(self) -> bool:
        return self.host == socket.gethostname()

    def has_ended(self) -> bool:
        """Whether the process has certainly ended. Always False for a process on another host."""
        return self.is_on_this_host and _birth(self.pid) != self.birth
