"""The Slurm job that this process runs in, and what becomes of the job when the process ends.

Slurm announces a time limit by SIGUSR2, and preemption, where a partition grants time, by SIGTERM. The stage saves and
ends; the first node then puts the job back into the queue. After a lost node Slurm requeues the job by itself.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass

from halo_cluster import signals
from halo_cluster.jobs import SchedulerUnreachable
from halo_cluster.ranks import THIS_MACHINE, Nodes
from halo_cluster.slurm.queue import call

STOPPED_CODES = (75, 130)
USER_ERROR_CODE = 2
_KILL_SECONDS = 60.0


def become_python(*words: str) -> None:
    """Replace this process by `python WORDS...`. Submitit calls this in each task.

    So Submitit takes no further part in the job, and Slurm signals our process directly. SIGTERM and SIGUSR2 are held
    back until that process calls `unblock_stop_signals`.
    """
    signals.block_stop_signals()
    os.execv(sys.executable, [sys.executable, *words])


@dataclass(frozen=True)
class SlurmJob:
    """The job of this process. `restart` counts how often it was requeued."""

    number: str
    restart: int
    nodes: Nodes

    @classmethod
    def current(cls) -> SlurmJob | None:
        """None outside of Slurm."""
        if "SLURM_JOB_ID" not in os.environ:
            return None
        from submitit import JobEnvironment

        job = JobEnvironment()
        nodes = Nodes(job.num_nodes, job.node, job.hostnames[0]) if job.num_nodes > 1 else THIS_MACHINE
        return cls(job.raw_job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0")), nodes)

    @property
    def attempt_label(self) -> str:
        return f"{self.number}.{self.restart}"

    def exit_code(self, code: int, retries: int) -> int:
        """The exit code for a stage that ended with `code` (as of `halo`), after requeueing the job where that helps.

        Only the first node requeues. On another node an exit code other than 0 makes Slurm kill the first one, which
        may still be publishing; so after a stop it is 0. `retries` is how often a job without a driver requeues itself
        after a failure.
        """
        # A process that was asked before it could save may fail in any way; it resumes from its last checkpoint.
        asked = signals.stop_requested() and code != USER_ERROR_CODE
        if self.nodes.this > 0:
            return 0 if asked or code in STOPPED_CODES else code
        if code and (asked or (code == 1 and self.restart < retries)):
            try:
                self.requeue()
            except (SchedulerUnreachable, ValueError) as error:
                os.write(2, f"the job could not be requeued: {error}\n".encode())  # perhaps in a signal handler
                return code
            return 0
        return code

    def requeue(self) -> None:
        """Put the job back into the queue, unless Slurm is ending it (scancel), and wait for Slurm's SIGTERM."""
        if "JobState=RUNNING" in call(["scontrol", "show", "job", self.number]):
            call(["scontrol", "requeue", self.number])
            signals.wait_for(signal.SIGTERM, _KILL_SECONDS)
