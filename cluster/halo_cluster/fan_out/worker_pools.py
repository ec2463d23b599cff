"""The contract between the driver and a backend, and the two backends of one machine."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from halo_cluster.children import Child, end_children, start_child
from halo_cluster.fan_out.task_pool import TaskPool
from halo_cluster.fan_out.worker import work

GRACE_SECONDS = 5.0  # workers hold nothing but the tasks they are at, which are not worth waiting for


@dataclass(frozen=True)
class Launch:
    """What a backend starts workers for. Schedulers and dashboards show `name`, that of the run and the stage."""

    pool: TaskPool
    plan_file: Path
    name: str
    check: Callable[[], object]
    """Reports progress to the caller, and raises when the tasks cannot be finished."""


def unique_name(kind: str) -> str:
    """A new name for a worker or a group of workers."""
    return f"{kind}-{uuid.uuid4().hex[:12]}"


def fan_out_command(role: str, *arguments: str | Path) -> list[str]:
    """The command of a process in one of the roles of `halo_cluster.fan_out.__main__`."""
    return [sys.executable, "-m", "halo_cluster.fan_out", role, *map(str, arguments)]


class WorkerPool(Protocol):
    """Workers of one fan-out."""

    def ensure_running(self) -> None:
        """Start the workers that are missing, and end those that the task pool has marked. Mark in the task pool those
        that have ended. Called several times a second."""

    def end(self) -> None:
        """End all workers."""


class Backend(Protocol):
    """Starts workers somewhere."""

    @property
    def workers(self) -> int: ...

    def worker_pool(self, launch: Launch) -> WorkerPool: ...


@dataclass(frozen=True)
class ThisProcess:
    """One worker, in the calling process: what it has loaded is used again."""

    workers: int = 1

    def worker_pool(self, launch: Launch) -> WorkerPool:
        return _OwnWork(launch)


@dataclass(frozen=True)
class _OwnWork:
    launch: Launch

    def ensure_running(self) -> None:
        """Does all tasks that are left."""
        work(self.launch.pool, unique_name("here"), self.launch.check)

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class LocalProcesses:
    """`workers` processes of this machine, which end when this one does.

    With `gpus_per_worker`, worker k sees the k-th group of that many of the devices that this process sees.
    """

    workers: int
    gpus_per_worker: int = 0

    def worker_pool(self, launch: Launch) -> WorkerPool:
        return _Processes(launch, [self._environment(slot) for slot in range(self.workers)])

    def _environment(self, slot: int) -> dict[str, str]:
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
        if self.gpus_per_worker:
            last = (slot + 1) * self.gpus_per_worker
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(device) for device in range(last)]
            if len(devices) < last:
                raise ValueError(
                    f"{self.workers} workers with {self.gpus_per_worker} GPUs each need more than "
                    f"CUDA_VISIBLE_DEVICES={visible}; use fewer workers"
                )
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[last - self.gpus_per_worker : last])
        return environment


@dataclass
class _Processes:
    launch: Launch
    environments: list[dict[str, str]]
    processes: dict[int, tuple[str, Child]] = field(default_factory=dict)
    """By slot: the worker's name and its process."""

    def ensure_running(self) -> None:
        pool = self.launch.pool
        for slot in range(len(self.environments)):
            name, process = self.processes.get(slot, ("", None))
            if process is None:
                self._start(slot)
            elif process.poll() is not None:
                pool.mark_ended(name, "its process ended")
                if not pool.nothing_left():
                    self._start(slot)
            elif pool.has_to_end(name):
                process.kill()

    def _start(self, slot: int) -> None:
        name = unique_name("local")
        command = fan_out_command("worker", self.launch.plan_file, name)
        log = self.launch.pool.workers / f"{name}.log"
        self.processes[slot] = (name, start_child(command, log=log, environment=self.environments[slot]))

    def end(self) -> None:
        end_children([process for _, process in self.processes.values()], GRACE_SECONDS)
