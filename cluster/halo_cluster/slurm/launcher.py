"""What runs on every node of a stage's job: starts the stage's process there, passes signals on, sees to its end.

Slurm tells a job of its time limit, and of preemption where a partition grants time, by SIGUSR2 and SIGTERM. The stage
saves and ends with STOPPED; the first node then puts the job back into the queue. Slurm requeues by itself after a lost
node. The environment carries the rest (`launched_as`): HALO_ATTEMPT, HALO_NODES, HALO_NODE, HALO_ADDRESS, HALO_PORT.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from types import FrameType

from halo_cluster.ranks import THIS_MACHINE, Nodes
from halo_cluster.slurm.queue import call

STOPPED_CODES = (75, 130)
USER_ERROR_CODE = 2
_REQUESTS = (signal.SIGTERM, signal.SIGUSR2)
_END_SECONDS = 60.0


@dataclass(frozen=True)
class Launcher:
    """The function that Submitit calls in each task; plain words, so that its pickle needs only this module."""

    command: tuple[str, ...]
    failures: int
    """How often a job that no driver looks after puts itself back into the queue after a failure."""

    def __call__(self) -> None:
        environment = {**os.environ, **_environment()}
        child = subprocess.Popen(self.command, env=environment)
        asked: list[int] = []

        def pass_on(number: int, frame: FrameType | None) -> None:
            asked.append(number)
            child.send_signal(number)

        for number in _REQUESTS:
            signal.signal(number, pass_on)
        code = child.wait()
        if code == 0:
            return
        first = environment["HALO_NODE"] == "0"
        if code in STOPPED_CODES and not first:
            return  # an error code here would have the first node killed while it still publishes
        if asked and code != USER_ERROR_CODE:
            # Asked before it could save, it may have ended in any way; it goes on from its last checkpoint.
            if first:
                _requeue()
            return
        if first and code == 1 and _failures_so_far() <= self.failures:
            _requeue()
            return
        raise SystemExit(code if code > 0 else 128 - code)


def _failures_so_far() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1


def _environment() -> dict[str, str]:
    from submitit import JobEnvironment

    job = JobEnvironment()
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return {
        "HALO_ATTEMPT": f"{job.raw_job_id}.{restart}",
        "HALO_NODES": str(job.num_nodes),
        "HALO_NODE": str(job.node),
        "HALO_ADDRESS": job.hostnames[0],
        # Another port after every requeue: the one before may still be held by processes that are about to be killed.
        "HALO_PORT": str(20000 + (int(job.raw_job_id) * 7 + restart) % 10000),
    }


def launched_as() -> tuple[str, Nodes] | None:
    """In the process that a launcher started: the attempt's label and the nodes. None elsewhere."""
    if "HALO_ATTEMPT" not in os.environ:
        return None
    count, this = int(os.environ["HALO_NODES"]), int(os.environ["HALO_NODE"])
    if count == 1:
        return os.environ["HALO_ATTEMPT"], THIS_MACHINE
    nodes = Nodes(count, this, os.environ["HALO_ADDRESS"], int(os.environ["HALO_PORT"]))
    return os.environ["HALO_ATTEMPT"], nodes


def _requeue() -> None:
    """Put this job back into the queue, unless Slurm is ending it (scancel); it then ends what is left of it here."""
    job = os.environ["SLURM_JOB_ID"]
    if "JobState=RUNNING" not in call(["scontrol", "show", "job", job]):
        return
    call(["scontrol", "requeue", job])
    time.sleep(_END_SECONDS)
