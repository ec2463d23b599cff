"""One stage as a job of a scheduler: what its launcher starts on every node.

    python -m halo_jobs.stage_job <work file>

The first node makes the attempt and publishes; the others take part where a stage trains in several processes. Exit
codes as of `halo` itself: 0, 1, 2 for user errors, 75 after a stop on request, 130 when interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from durable_files import read_json
from halo_cluster import THIS_MACHINE, Attempt, Nodes, StageRecord, StageResult, StopRequested, carry_out
from halo_cluster.slurm.launcher import launched_as
from halo_jobs.terminal import STOPPED_EXIT_CODE, Interruption, quieten_libraries, sentence
from halo_jobs.worker import join_processes, run_in_processes, run_stage


def _run(work: dict[str, Any], nodes: Nodes, attempt: Attempt, console: Console) -> StageResult:
    from halo_jobs.work import StageWork

    StageWork.from_json(work).record_in(attempt.folder)
    processes = work["processes"]
    if processes > 1:
        return run_in_processes(attempt.folder, work, processes, nodes)
    return run_stage(work, attempt, console)


def run_job(work: dict[str, Any], label: str, nodes: Nodes) -> None:
    """Bring the stage to DONE as the attempt `label`, unless it is; raises what `carry_out` raises."""
    record = StageRecord(Path(work["folder"]))
    if record.done() is not None:
        return
    console = Console(force_terminal=False, width=120)
    attempt = record.begin_attempt(label)
    carry_out(work["stage"], attempt, lambda attempt: _run(work, nodes, attempt, console))


def main(work_file: Path) -> int:
    # Stages that do not train have nothing to save: their finished tasks are in files.
    interruption = Interruption((signal.SIGINT, signal.SIGTERM, signal.SIGUSR2))
    quieten_libraries()
    label, nodes = launched_as() or (f"0.{os.getpid()}", THIS_MACHINE)
    work = read_json(work_file)
    try:
        if nodes.this > 0:
            return join_processes(
                StageRecord(Path(work["folder"])).attempt_folder(label), work["processes"], nodes
            )
        run_job(work, label, nodes)
    except BaseException as problem:
        if interruption.requested:
            interruption.end()
        print(f"{type(problem).__name__}: {sentence(problem)}", file=sys.stderr)
        if isinstance(problem, StopRequested):
            return STOPPED_EXIT_CODE
        if not isinstance(problem, (ValueError, RuntimeError, OSError)):
            raise
        return 2 if isinstance(problem, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
