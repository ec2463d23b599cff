"""Runs a stage in several ranks: the driver's functions, and the main function of each rank.

    python -m halo_jobs.worker <attempt folder>

halo_cluster/attempts.py describes the files in the attempt folder. A rank exits with 0, with 1 after a failure, or with
STOPPED_EXIT_CODE after a stop on request.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from durable_files import read_json, write_json
from halo_cluster import (
    THIS_MACHINE,
    ExitReport,
    Nodes,
    RankFailed,
    StageRecord,
    StageResult,
    StopRequested,
    end_with_parent,
    rank_log,
    run_ranks,
)
from halo_cluster.attempts import rank_report_path
from halo_cluster.record import DONE_FILE
from halo_cluster.signals import STOP_SIGNALS, ignore, on_stop_request
from halo_cluster.storage import storage_sentence
from halo_jobs.attempt import JoinedAttempt
from halo_jobs.terminal import STOPPED_EXIT_CODE, quieten_libraries, sentence

if TYPE_CHECKING:
    from halo_training.trainer import AttemptInProgress

WORK = "work.json"
_RESUMES = "the same command resumes from the last checkpoint"
_POLL_SECONDS = 0.2
# Slurm ends all tasks of a job when one fails, so the other nodes wait until the first node has recorded the failure.
_FIRST_NODE_SECONDS = 30.0


def run_in_processes(
    attempt: Path, work: dict[str, Any], processes: int, nodes: Nodes = THIS_MACHINE
) -> StageResult:
    """Run the stage that `work` describes (StageWork.to_json) in `processes` ranks.

    The first of `nodes` calls this; the others call `join_processes`. Raises ValueError, StopRequested or RankFailed
    with the message of the rank at fault.
    """
    write_json(attempt / WORK, work)
    try:
        run_ranks(_command(attempt), processes, attempt, nodes)
    except RankFailed as failed:
        raise _error(failed) from None
    report = ExitReport.read(rank_report_path(attempt, 0))
    assert report is not None and report.state == "done"
    return StageResult([attempt.parent / output for output in report.result["outputs"]], report.result["summary"])


def join_processes(attempt: Path, processes: int, nodes: Nodes) -> int:
    """Run this node's ranks of a stage that the first node runs with `run_in_processes`. Returns an exit code."""
    while not (attempt / WORK).exists():
        # A job that is requeued after its stage is done does not begin an attempt.
        if (attempt / "exit.json").exists() or (attempt.parent / DONE_FILE).exists():
            return 0
        time.sleep(_POLL_SECONDS)
    try:
        run_ranks(_command(attempt), processes, attempt, nodes)
    except RankFailed as failed:
        if failed.report.state == "interrupted":
            return STOPPED_EXIT_CODE
        deadline = time.monotonic() + _FIRST_NODE_SECONDS
        while not (attempt / "exit.json").exists() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return 1
    return 0


def _command(attempt: Path) -> list[str]:
    return [sys.executable, "-m", "halo_jobs.worker", str(attempt)]


def _error(failed: RankFailed) -> Exception:
    """The exception of the rank at fault, with its traceback as a note."""
    report = failed.report
    error: Exception = failed
    if report.state == "lost":
        error.args = (f"{report.reason}; {_RESUMES}",)
    elif report.state == "interrupted":
        error = StopRequested(report.reason, by_user=report.final)
    elif report.final:
        error = ValueError(report.reason)
    error.add_note(f"in rank {report.rank}:\n{report.traceback}")
    return error


def run_stage(work: dict[str, Any], attempt: AttemptInProgress, console: Console) -> StageResult:
    """Run this process's part of the stage: as the rank that its environment names, or alone."""
    from halo_jobs.stages import table
    from halo_jobs.work import StageWork

    return table.run_stage(StageWork.from_json(work), attempt, console)


def _is_consequence(problem: Exception) -> bool:
    """Whether `problem` follows from a fault in another rank."""
    if isinstance(problem, ImportError):  # importing torch below could fail again
        return False
    from halo_training.supervision import PeerLost, is_lost_peer
    from hypenet_megatron.runtime import RendezvousTimeout

    return isinstance(problem, PeerLost | RendezvousTimeout) or is_lost_peer(problem)


def _report_of(problem: Exception, rank: int, stage_folder: Path) -> ExitReport:
    if isinstance(problem, StopRequested):
        return ExitReport("interrupted", sentence(problem), final=problem.by_user, rank=rank)
    if isinstance(problem, OSError) and problem.errno is not None:
        reason = storage_sentence(stage_folder, problem)
    else:
        reason = sentence(problem)
    trace = traceback.format_exc()
    if _is_consequence(problem):
        return ExitReport("affected", reason, rank=rank, traceback=trace)
    is_user_error = isinstance(problem, ValueError)
    return ExitReport("failed", reason, socket.gethostname(), is_user_error, rank=rank, traceback=trace)


def main(attempt: Path, rank: int) -> int:
    logging.basicConfig(filename=rank_log(attempt, rank))
    quieten_libraries()
    work = read_json(attempt / WORK)
    stage_folder = Path(work["folder"])
    joined = JoinedAttempt(StageRecord(stage_folder), attempt, rank)

    def stop(number: signal.Signals) -> None:
        """End a stage that is loading models or writing weights. During training, the trainer handles the request."""
        joined.report(
            ExitReport("interrupted", f"stopped by {number.name} while it was not training", rank=rank)
        )
        os._exit(STOPPED_EXIT_CODE)

    with on_stop_request(stop):
        try:
            result = run_stage(work, joined, Console(quiet=rank > 0))
        except Exception as problem:
            ignore(*STOP_SIGNALS)  # the parent may send these to end all ranks, but this one must report first
            joined.report(_report_of(problem, rank, stage_folder))
            return STOPPED_EXIT_CODE if isinstance(problem, StopRequested) else 1
        outputs = [str(output.relative_to(stage_folder)) for output in result.outputs]
        made = {"outputs": outputs, "summary": result.summary}
        joined.report(ExitReport("done", rank=rank, result=made if rank == 0 else None))
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(Path(sys.argv[1]), int(os.environ["RANK"])))
