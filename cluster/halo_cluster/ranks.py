"""The ranks of a stage that runs in several processes. Each node starts its own.

The ranks live and die together: when one fails or is killed the others are ended, and all end with their parent. The
environment names a rank (RANK, LOCAL_RANK, WORLD_SIZE), the host of rank 0 (MASTER_ADDR) and the folder in which rank 0
publishes the port that it listens at (HALO_RENDEZVOUS). SIGTERM and SIGUSR2 to the parent are requests to save and
stop: they go to its first rank, which agrees with the others.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halo_cluster.attempts import ExitReport, cause, rank_report_path, rank_reports
from halo_cluster.children import Child, end_children, start_child
from halo_cluster.signals import STOP_SIGNALS, on_stop_request, stop_requested

_POLL_SECONDS = 0.1
_POLL_OTHER_NODES_SECONDS = 1.0
# Ranks notice by themselves that another node's rank is gone, and say where in their work; but not before all have met.
_NOTICE_SECONDS = 5.0
# Ranks that stop together end within moments of each other, unless one was not yet training.
_STOP_NOTICE_SECONDS = 30.0
_ERROR_PROPAGATION_SECONDS = 2.0


class RankFailed(RuntimeError):
    """A rank did not finish. `report` is that of the rank at fault."""

    def __init__(self, report: ExitReport) -> None:
        super().__init__(report.reason)
        self.report = report
        self.host = report.host


@dataclass(frozen=True)
class Nodes:
    """The machines that share a stage: how many, which of them this is, and the host name of the first."""

    count: int = 1
    this: int = 0
    address: str = "127.0.0.1"


THIS_MACHINE = Nodes()


def rank_log(attempt: Path, rank: int) -> Path:
    return attempt / f"rank-{rank}.txt"


def run_ranks(command: Sequence[str], ranks: int, attempt: Path, nodes: Nodes = THIS_MACHINE) -> None:
    """Run this node's part of `ranks` ranks of `command`; returns when all of this node's have ended with 0.

    RankFailed if one of them does not, or if another node's rank has failed. Ranks report their own end in the folder
    `attempt` (ExitReport); this function reports for those that could not. Rank 0 has the stdout and stderr of this
    process, the others print to their `rank_log`. `command` has to call `end_with_parent` first. ValueError if nodes
    cannot share the ranks evenly.
    """
    if ranks % nodes.count:
        raise ValueError(
            f"{ranks} ranks cannot be shared evenly by {nodes.count} nodes; change layout.processes or cluster.nodes"
        )
    local_ranks = ranks // nodes.count
    group = _RankGroup(ranks, range(nodes.this * local_ranks, (nodes.this + 1) * local_ranks), attempt)
    environment = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": nodes.address,
        "HALO_RENDEZVOUS": str(attempt),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_ranks)))
    try:
        for local_rank, rank in enumerate(group.own):
            log = None if rank == 0 else rank_log(attempt, rank)
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(local_rank)}
            group.children.append(start_child(command, log=log, environment=own))
        with on_stop_request(group.children[0].send_signal):
            finished = group.wait()
        if not finished:
            group.report_silent()
    finally:
        end_children(group.children)
    if not finished:
        reports = _all_reports(attempt, ranks)
        report = cause(reports)
        if report or len(reports) < ranks:  # otherwise all are done, and only the exit of a process went wrong
            raise RankFailed(report or ExitReport("lost", f"{ranks - len(reports)} ranks did not report"))


def _all_reports(attempt: Path, ranks: int) -> list[ExitReport]:
    """The reports of all ranks, or what there is after _ERROR_PROPAGATION_SECONDS: a node may be gone."""
    deadline = time.monotonic() + _ERROR_PROPAGATION_SECONDS
    while len(reports := rank_reports(attempt, range(ranks))) < ranks and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return reports


class _RankGroup:
    """The ranks `own` of `ranks`, as children of this process in this order."""

    def __init__(self, ranks: int, own: range, attempt: Path) -> None:
        self.ranks, self.own, self.attempt = ranks, own, attempt
        self.children: list[Child] = []
        self._others = [rank for rank in range(ranks) if rank not in own]

    def wait(self) -> bool:
        """True when all have ended with 0, false when one has not, here or on another node."""
        looked, deadline = time.monotonic(), math.inf
        while True:
            codes = [child.poll() for child in self.children]
            if any(codes):
                time.sleep(_POLL_SECONDS)  # a killed rank takes others along, which may be seen first
                return False
            if None not in codes:
                return True
            now = time.monotonic()
            if now >= deadline:
                return False
            if now - looked >= _POLL_OTHER_NODES_SECONDS:
                looked = now
                deadline = min(deadline, now + self._seconds_left())
            time.sleep(_POLL_SECONDS)

    def _seconds_left(self) -> float:
        """How long these ranks may still run, as the ends of other nodes' ranks tell: infinite if none has failed."""
        states = {report.state for report in rank_reports(self.attempt, self._others)} - {"done"}
        if not states:
            return math.inf
        return _STOP_NOTICE_SECONDS if states == {"interrupted"} else _NOTICE_SECONDS

    def report_silent(self) -> None:
        """Report the end of those that could not; a report that a rank has published stands.

        A rank that still runs may be about to report the cause, so it gets a moment.
        """
        deadline = time.monotonic() + _ERROR_PROPAGATION_SECONDS
        self._report_ended()
        while None in [child.poll() for child in self.children] and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        self._report_ended()
        for rank in self.own:
            report = ExitReport("affected", "was ended with the other ranks", rank=rank)
            report.publish(rank_report_path(self.attempt, rank))

    def _report_ended(self) -> None:
        host = socket.gethostname()
        where = f" on {host}" if self._others else ""
        for rank, child in zip(self.own, self.children, strict=True):
            code = child.poll()
            if not code:
                continue
            if -code in STOP_SIGNALS and stop_requested():
                reason = f"stopped by {signal.Signals(-code).name} while rank {rank} was starting"
                report = ExitReport("interrupted", reason, rank=rank)
            else:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                report = ExitReport("lost", f"rank {rank} of {self.ranks} {how}{where}", host, rank=rank)
            report.publish(rank_report_path(self.attempt, rank))
