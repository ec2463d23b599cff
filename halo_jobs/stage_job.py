"""Runs one stage as a job of a scheduler, with one process per node.

    python -m halo_jobs.stage_job <work file> [<retries>]

The first node begins the attempt and publishes its results; the other nodes only run ranks of a training stage. Exit
codes are those of `halo`: 0, 1, 2 for user errors, 75 after a stop on request, 130 when interrupted. Under Slurm, the
job may instead be requeued (halo_cluster/slurm/job.py), after failures at most `retries` times.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from durable_files import read_json
from halo_cluster import (
    THIS_MACHINE,
    Attempt,
    Nodes,
    StageRecord,
    StageResult,
    StopRequested,
    execute_attempt,
)
from halo_cluster.signals import INTERRUPTED_EXIT_CODE, InterruptHandler, unblock_stop_signals
from halo_cluster.slurm.job import SlurmJob
from halo_jobs.terminal import STOPPED_EXIT_CODE, quieten_libraries, sentence
from halo_jobs.worker import join_processes, run_in_processes, run_stage


def _run(work: dict[str, Any], nodes: Nodes, attempt: Attempt, console: Console) -> StageResult:
    from halo_jobs.work import StageWork

    stage = StageWork.from_json(work)
    stage.record_in(attempt.folder)
    # The watchdog of a training ends its process. This one has to live on to requeue the job.
    if stage.id.kind in stage.recipe.training_sections:
        return run_in_processes(attempt.folder, work, work["processes"], nodes)
    return run_stage(work, attempt, console)


def run_job(work: dict[str, Any], label: str, nodes: Nodes) -> None:
    """Run the stage as the attempt `label`, unless it is done. Raises what `execute_attempt` raises."""
    record = StageRecord(Path(work["folder"]))
    if record.done() is not None:
        return
    console = Console(force_terminal=False, width=120)
    attempt = record.begin_attempt(label)
    execute_attempt(work["stage"], attempt, lambda attempt: _run(work, nodes, attempt, console))


def _run_node(work_file: Path, job: SlurmJob | None, interrupts: InterruptHandler) -> int:
    label, nodes = (job.attempt_label, job.nodes) if job else (f"0.{os.getpid()}", THIS_MACHINE)
    work = read_json(work_file)
    try:
        if nodes.this > 0:
            attempt = StageRecord(Path(work["folder"])).attempt_folder(label)
            return join_processes(attempt, work["processes"], nodes)
        run_job(work, label, nodes)
    except BaseException as problem:
        if interrupts.requested:
            interrupts.end()
        print(f"{type(problem).__name__}: {sentence(problem)}", file=sys.stderr, flush=True)
        if isinstance(problem, StopRequested):
            return STOPPED_EXIT_CODE
        if not isinstance(problem, (ValueError, RuntimeError, OSError)):
            raise
        return 2 if isinstance(problem, ValueError) else 1
    return 0


def main(work_file: Path, retries: int) -> int:
    job = SlurmJob.current()

    def last() -> int:
        return job.exit_code(INTERRUPTED_EXIT_CODE, retries) if job else INTERRUPTED_EXIT_CODE

    # Stages that do not train need not save anything when interrupted: their finished tasks are already in files.
    interrupts = InterruptHandler((signal.SIGINT, signal.SIGTERM, signal.SIGUSR2), last)
    unblock_stop_signals()
    quieten_libraries()
    code = _run_node(work_file, job, interrupts)
    return job.exit_code(code, retries) if job else code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
