"""The process that is connected to Ray: keeps as many actors at work as it was told to.

It may be ended at any time: actors end with it, and what they published stays.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from halo_cluster.fan_out.crews import Patience
from halo_cluster.fan_out.plan import import_function
from halo_cluster.fan_out.task_pool import FanOutFailed, TaskPool
from halo_cluster.fan_out.worker import open_pool, work
from halo_cluster.ranks import end_with_parent
from halo_cluster.ray_metrics import published_in_ray

NAMESPACE = "halo"
_CONNECT_SECONDS = 120.0
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class RayWork:
    """`workers` actors, named `shown` and a number, each with so many CPUs and GPUs.

    `joined`: the cluster was started by somebody else, so its workers have to be told where our code is. Those of a
    cluster of ours inherit it, and can be the ones that Ray starts beforehand, which have no environment of their own.

    `metrics`, if not empty, is a "module:function" that returns the samples to show in Ray, of the folder `metrics_of`.
    """

    address: str
    crew: str
    shown: str
    workers: int
    cpus: int
    gpus: int
    joined: bool
    metrics: str = ""
    metrics_of: str = ""


class FanOutWorker:
    """What the actors are."""

    def work(self, plan_file: str, name: str) -> None:
        work(open_pool(Path(plan_file)), name)


def _wait_for(address: str) -> None:
    """Until something listens at host:port, or for _CONNECT_SECONDS."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _CONNECT_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=5.0):
            return
        time.sleep(0.3)


class _Actors:
    """The crew: by the reference of its `work` call, each actor with its worker's name."""

    def __init__(self, plan_file: Path, pool: TaskPool, plan: RayWork) -> None:
        self._plan_file, self._pool, self._plan = plan_file, pool, plan
        self._at_work: dict[Any, tuple[Any, str]] = {}
        self._numbers = count()

    def start(self) -> None:
        import ray

        name = f"{self._plan.crew}-{(number := next(self._numbers))}"
        environment = {}
        if self._plan.joined and "PYTHONPATH" in os.environ:
            environment = {"runtime_env": {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}}
        actor: Any = (
            ray.remote(FanOutWorker)
            .options(
                name=f"{self._plan.shown} {self._plan.crew} {number}",
                num_cpus=self._plan.cpus,
                num_gpus=self._plan.gpus,
                **environment,
            )
            .remote()
        )
        self._at_work[actor.work.remote(str(self._plan_file), name)] = (actor, name)

    def replace_ended(self) -> int:
        """Wait a little; start others for actors that ended before the work did. Returns how many."""
        import ray

        for actor, name in self._at_work.values():
            if self._pool.has_to_end(name):
                ray.kill(actor)
        ended, _ = ray.wait(list(self._at_work), num_returns=len(self._at_work), timeout=_LOOK_SECONDS)
        for reference in ended:
            _, name = self._at_work.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                print(f"{name}: {error}", flush=True)
                self._pool.ended(name, f"Ray says: {type(error).__name__}")
            if not self._pool.nothing_left():
                self.start()
        return len(ended)


def main(plan_file: str, work: str) -> None:
    """`work` is the JSON of a RayWork."""
    end_with_parent()
    _keep_at_work(Path(plan_file), RayWork(**json.loads(work)))


def _keep_at_work(plan_file: Path, plan: RayWork) -> None:
    import ray

    pool = open_pool(plan_file)
    if "://" not in plan.address and ":" in plan.address:
        _wait_for(plan.address)
    metadata = {"job_name": plan.shown}
    ray.init(
        plan.address,
        namespace=NAMESPACE,
        log_to_driver=False,
        job_config=ray.job_config.JobConfig(metadata=metadata),
    )
    with _shown_metrics(plan):
        actors = _Actors(plan_file, pool, plan)
        for _ in range(plan.workers):
            actors.start()
        patience = Patience(pool, plan.workers)
        while not pool.nothing_left():
            try:
                patience.after(actors.replace_ended())
            except FanOutFailed as failure:
                pool.give_up(str(failure))
                return


def _shown_metrics(plan: RayWork) -> AbstractContextManager[None]:
    if not plan.metrics:
        return nullcontext()
    samples = import_function(plan.metrics)
    return published_in_ray(lambda: samples(Path(plan.metrics_of)))
