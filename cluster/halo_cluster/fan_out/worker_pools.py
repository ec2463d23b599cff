"""The contract between the driver and a backend, and the two backends of one machine."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from halo_cluster.children import Child, end_children, start_child
from halo_cluster.fan_out.task_pool import FanOutFailed, TaskPool
from halo_cluster.fan_out.worker import work

GRACE_SECONDS = 5.0  # workers hold nothing but the tasks they are at, which are not worth waiting for


@dataclass(frozen=True)
class Launch:
    """What a backend starts workers for. Schedulers and dashboards show `name`, that of the run and the stage."""

    pool: TaskPool
    plan_file: Path
    name: str
    check: Callable[[], None]
    """Reports progress to the caller, and raises when the tasks cannot be finished."""


def unique_name(kind: str) -> str:
    """A new name for a worker or a group of workers."""
    return f"{kind}-{uuid.uuid4().hex[:12]}"


def fan_out_command(role: str, *arguments: str | Path) -> list[str]:
    """The command of a process in one of the roles of `halo_cluster.fan_out.__main__`."""
    return [sys.executable, "-m", "halo_cluster.fan_out", role, *map(str, arguments)]


class WorkerPool(Protocol):
    """Workers of one fan-out."""

    def ensure_running(self) -> int:
        """Start the workers that are missing, and end those that the task pool has marked. Called several times a
        second; returns how many workers were replaced."""


class Backend(Protocol):
    """Starts workers somewhere. When the block is left the workers are ended, unless the caller itself was killed."""

    @property
    def workers(self) -> int: ...

    def worker_pool(self, launch: Launch) -> AbstractContextManager[WorkerPool]: ...


class ReplacementLimit:
    """Any number of workers may be lost while results come in; too many in a row without one end the fan-out."""

    def __init__(self, pool: TaskPool, workers: int) -> None:
        self._pool = pool
        self._limit = 9 + 3 * workers
        self._published = 0
        self._replaced = 0

    def add(self, replaced: int) -> int:
        """Returns how many workers were replaced since the newest result; FanOutFailed if they are too many."""
        if replaced and (published := len(self._pool.published())) > self._published:
            self._published, self._replaced = published, 0
        self._replaced += replaced
        if self._replaced > self._limit:
            raise FanOutFailed(
                f"{self._replaced} workers in a row ended without a result; their logs are in {self._pool.workers}"
            )
        return self._replaced


@dataclass(frozen=True)
class ThisProcess:
    """One worker, in the calling process: what it has loaded is used again."""

    workers: int = 1

    @contextmanager
    def worker_pool(self, launch: Launch) -> Iterator[WorkerPool]:
        yield _OwnWork(launch)


@dataclass
class _OwnWork:
    launch: Launch
    begun: bool = False

    def ensure_running(self) -> int:
        """Does all tasks that are left."""
        again, self.begun = self.begun, True
        work(self.launch.pool, unique_name("here"), self.launch.check)
        return int(again)


@dataclass(frozen=True)
class LocalProcesses:
    """`workers` processes of this machine, which end when this one does.

    With `gpus_per_worker`, worker k sees the k-th group of that many of the devices that this process sees.
    """

    workers: int
    gpus_per_worker: int = 0

    @contextmanager
    def worker_pool(self, launch: Launch) -> Iterator[WorkerPool]:
        pool = _Processes(launch, [self._environment(slot) for slot in range(self.workers)])
        try:
            yield pool
        finally:
            end_children([process for _, process in pool.processes.values()], GRACE_SECONDS)

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

    def ensure_running(self) -> int:
        replaced = 0
        for slot in range(len(self.environments)):
            name, process = self.processes.get(slot, ("", None))
            if process is None:
                self._start(slot)
            elif process.poll() is not None:
                if not self.launch.pool.nothing_left():
                    self._start(slot)
                    replaced += 1
            elif self.launch.pool.has_to_end(name):
                process.kill()
        return replaced

    def _start(self, slot: int) -> None:
        name = unique_name("local")
        command = fan_out_command("worker", self.launch.plan_file, name)
        log = self.launch.pool.workers / f"{name}.log"
        self.processes[slot] = (name, start_child(command, log=log, environment=self.environments[slot]))
