"""Workers as the elements of Slurm job arrays, submitted through Submitit.

Slurm does not requeue elements, which would delay them by two minutes: the driver submits others. Elements continue
without a driver, and a driver that is started again recognises them by their job name.
"""

from __future__ import annotations

import getpass
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from halo_cluster.fan_out.worker import open_pool, work
from halo_cluster.fan_out.worker_pools import Launch, WorkerPool
from halo_cluster.jobs import SchedulerUnreachable
from halo_cluster.record import input_hash
from halo_cluster.signals import unblock_stop_signals
from halo_cluster.slurm.job import become_python
from halo_cluster.slurm.queue import call
from halo_cluster.slurm.settings import SlurmSettings
from halo_cluster.slurm.submit import refusals, submitit_executor

QUEUE_SECONDS = 5.0
_ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED"}


@dataclass(frozen=True)
class SlurmArray:
    """`workers` jobs of one task each. They request `settings`, with these CPUs, GPUs and this memory."""

    workers: int
    settings: SlurmSettings = field(default_factory=SlurmSettings)
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    memory_gb_per_worker: float | None = None

    def worker_pool(self, launch: Launch) -> WorkerPool:
        return _Elements(self, launch)


class _Elements:
    def __init__(self, backend: SlurmArray, launch: Launch) -> None:
        self._backend, self._launch = backend, launch
        place = {"folder": str(launch.pool.folder.resolve()), "plan": launch.pool.plan.digest}
        self._job_name = re.sub(r"[^\w.-]", ".", f"{launch.name}.{input_hash(place)}")
        self._ours = [f"--name={self._job_name}", f"--user={getpass.getuser()}"]
        self._seen: set[str] = set()
        self._next_poll = 0.0

    def ensure_running(self) -> None:
        """Reads the queue every QUEUE_SECONDS, also while the controller does not answer."""
        pool, now = self._launch.pool, time.monotonic()
        if now < self._next_poll:
            return
        self._next_poll = now + QUEUE_SECONDS
        with suppress(SchedulerUnreachable):
            alive = self._alive()
            self._seen |= alive
            for element in self._seen:
                if element not in alive:
                    pool.mark_ended(_worker_name(element), "its Slurm job ended")
                elif pool.has_to_end(_worker_name(element)):
                    call(["scancel", element])
                    alive = alive - {element}
            if len(alive) < self._backend.workers and not pool.nothing_left():
                self._submit(self._backend.workers - len(alive))

    def _alive(self) -> set[str]:
        """Elements that run or wait to, such as "17_3"; a single job is "17"."""
        lines = call(["squeue", "--noheader", "--array", *self._ours, "--format=%i %T"]).splitlines()
        return {element for element, state in (line.split() for line in lines) if state in _ALIVE}

    def _submit(self, count: int) -> None:
        backend = self._backend
        settings = replace(
            backend.settings,
            cpus_per_node=backend.cpus_per_worker,
            gpus_per_node=backend.gpus_per_worker or None,
            memory_gb=backend.memory_gb_per_worker,
        )
        executor = submitit_executor(
            self._launch.pool.folder / "jobs",
            settings,
            {"no-requeue": True},
            nodes=1,
            job_name=self._job_name,
            comment=f"halo {self._launch.name}",
        )
        plan_file = str(self._launch.plan_file.resolve())
        with refusals(), _outside_of_own_job(), executor.batch():
            for _ in range(count):
                executor.submit(become_python, "-m", "halo_cluster.fan_out", "array-element", plan_file)

    def end(self) -> None:
        """Running workers that find nothing left end by themselves; those that wait in the queue are cancelled."""
        states = ["--state=PENDING"] if self._launch.pool.nothing_left() else []
        with suppress(SchedulerUnreachable):
            call(["scancel", *self._ours, *states])


def _worker_name(element: str) -> str:
    return f"slurm-{element.replace('_', '-')}"


@contextmanager
def _outside_of_own_job() -> Iterator[None]:
    """Hide this process's own Slurm job: jobs that it submits must not inherit its size, memory and numbers."""
    own = {
        key: value for key, value in os.environ.items() if key.startswith("SLURM_") and key != "SLURM_CONF"
    }
    for key in own:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(own)


def main(plan_file: str) -> None:
    """The process of an element."""
    unblock_stop_signals()
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    element = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    work(open_pool(Path(plan_file)), _worker_name(element))
