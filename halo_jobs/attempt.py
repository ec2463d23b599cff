"""An attempt as the processes see it that work on it but did not begin it: ranks, and workers of a fan-out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from halo_cluster import ExitReport, StageRecord
from halo_cluster.attempts import rank_report_path, release_space


@dataclass(frozen=True)
class JoinedAttempt:
    """The driver's attempt, in rank `rank`."""

    record: StageRecord
    folder: Path
    rank: int

    def report(self, report: ExitReport) -> None:
        """Record how this rank ended; the driver then records how the attempt ended."""
        release_space(self.folder)
        report.publish(rank_report_path(self.folder, self.rank))

    def fail(self, reason: str) -> None:
        """Record that this rank ends because some rank hangs or is gone; where the fault is, is not known."""
        self.report(ExitReport("affected", reason, rank=self.rank))
