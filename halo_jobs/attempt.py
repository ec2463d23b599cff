"""An attempt as the processes see it that work on it but did not begin it: ranks, and workers of a fan-out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from durable_files import publish_once
from halo_cluster import StageRecord

FAILURE = "failure.json"


@dataclass(frozen=True)
class JoinedAttempt:
    """The driver's attempt, in rank `rank`."""

    record: StageRecord
    folder: Path
    rank: int

    def fail(self, reason: str) -> None:
        """Leave the reason for the driver, which records how the attempt ended. The first rank to report is believed.

        The rank that ends the others is not where the fault is, so no host is named.
        """
        content = {"rank": self.rank, "host": "", "sentence": reason, "final": False, "traceback": ""}
        publish_once(self.folder / FAILURE, content)
