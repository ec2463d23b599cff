"""Who works: the contract between the driver and a backend, and the two backends of one machine."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from halo_cluster.fan_out.task_pool import FanOutFailed, TaskPool
from halo_cluster.fan_out.worker import work

PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Launch:
    """What a backend starts workers for. `name` is what schedulers and dashboards show: the run's and the stage's."""

    pool: TaskPool
    plan_file: Path
    name: str
    look: Callable[[], None]
    """Tells the caller's progress, and raises when the tasks cannot be finished."""


def new_name(kind: str) -> str:
    """For a worker or a group of workers: no other has it."""
    return f"{kind}-{uuid.uuid4().hex[:12]}"


class Crew(Protocol):
    """Workers that were started, and the duty to put others in the place of those that ended too early."""

    def tend(self) -> int:
        """Called several times a second. Starts workers where some are missing, ends those that the pool says have to
        end; returns how many took the place of others."""


class Backend(Protocol):
    """Starts workers somewhere. When the block is left the workers are ended, unless the caller itself was killed."""

    @property
    def workers(self) -> int: ...

    def crew(self, launch: Launch) -> AbstractContextManager[Crew]: ...


class Patience:
    """Workers may be lost as often as they like while results come in; too many in a row end the fan-out."""

    def __init__(self, pool: TaskPool, workers: int) -> None:
        self._pool = pool
        self._most = 9 + 3 * workers
        self._published = 0
        self._vain = 0

    def after(self, replaced: int) -> int:
        """Workers replaced since the newest result; FanOutFailed when they are too many."""
        if replaced and (published := len(self._pool.published())) > self._published:
            self._published, self._vain = published, 0
        self._vain += replaced
        if self._vain > self._most:
            raise FanOutFailed(
                f"{self._vain} workers in a row ended without a result; their logs are in {self._pool.workers}"
            )
        return self._vain


@dataclass(frozen=True)
class ThisProcess:
    """One worker, in the calling process: it has no others to share with, and what it loaded is loaded once."""

    workers: int = 1

    @contextmanager
    def crew(self, launch: Launch) -> Iterator[Crew]:
        yield _OwnWork(launch)


@dataclass
class _OwnWork:
    launch: Launch

    begun: bool = False

    def tend(self) -> int:
        """Does everything that is left."""
        again, self.begun = self.begun, True
        work(self.launch.pool, new_name("here"), self.launch.look)
        return int(again)


@dataclass(frozen=True)
class LocalProcesses:
    """`workers` processes of this machine, which end when this one does.

    With `gpus_per_worker`, worker k sees the k-th so many of the devices that this process would see.
    """

    workers: int
    gpus_per_worker: int = 0

    @contextmanager
    def crew(self, launch: Launch) -> Iterator[Crew]:
        crew = _Processes(launch, [self._environment(slot) for slot in range(self.workers)])
        try:
            yield crew
        finally:
            crew.end()

    def _environment(self, slot: int) -> dict[str, str]:
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
        if self.gpus_per_worker:
            last = (slot + 1) * self.gpus_per_worker
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(device) for device in range(last)]
            if len(devices) < last:
                raise ValueError(
                    f"{self.workers} workers of {self.gpus_per_worker} GPUs each need more than "
                    f"CUDA_VISIBLE_DEVICES={visible}; ask for fewer workers"
                )
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[last - self.gpus_per_worker : last])
        return environment


@dataclass
class _Processes:
    launch: Launch
    environments: list[dict[str, str]]
    processes: dict[int, tuple[str, subprocess.Popen[bytes]]] = field(default_factory=dict)
    """By slot: the worker's name and its process."""

    def tend(self) -> int:
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
        name = new_name("local")
        with open(self.launch.pool.workers / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "halo_cluster.fan_out", "worker", str(self.launch.plan_file), name],
                env=self.environments[slot],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the parent, who ends them
            )
        self.processes[slot] = (name, process)

    def end(self) -> None:
        """They hold nothing but tasks in hand, which are not worth waiting for."""
        end_processes([process for _, process in self.processes.values()])


def end_processes(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask children to end by SIGTERM and the end of their stdin, and after PATIENCE_SECONDS make them."""
    for process in processes:
        process.terminate()
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
