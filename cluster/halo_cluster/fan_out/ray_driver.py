"""The process that is connected to Ray and keeps a given number of actors at work.

It may be ended at any time: its actors end with it, and the results that they published stay.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from durable_files import publish_text_once
from halo_cluster.children import end_with_parent
from halo_cluster.fan_out.plan import import_function
from halo_cluster.fan_out.ray_node import wait_for_address
from halo_cluster.fan_out.task_pool import FanOutFailed, TaskPool
from halo_cluster.fan_out.worker import open_pool, work
from halo_cluster.fan_out.worker_pools import ReplacementLimit
from halo_cluster.ray_metrics import published_in_ray

NAMESPACE = "halo"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class RayWork:
    """`workers` actors with `cpus` CPUs and `gpus` GPUs each. Ray shows them as `title` and a number.

    `address` is that of a running cluster. None: the cluster is ours, and its head publishes the address in
    `pool`.address, beside the other files of the worker pool `pool`. Workers of a cluster of ours inherit PYTHONPATH.
    So they can be processes that Ray has started in advance, which have no environment of their own.

    `metrics`, if not empty, is a "module:function" that returns the samples to show in Ray, of the folder `metrics_of`.
    """

    address: str | None
    pool: str
    title: str
    workers: int
    cpus: int
    gpus: int
    metrics: str = ""
    metrics_of: str = ""


class FanOutWorker:
    """What the actors are."""

    def work(self, plan_file: str, name: str) -> None:
        work(open_pool(Path(plan_file)), name)


class _Actors:
    """The actors and their workers' names, by the reference of the actor's `work` call."""

    def __init__(self, plan_file: Path, pool: TaskPool, plan: RayWork) -> None:
        self._plan_file, self._pool, self._plan = plan_file, pool, plan
        self._at_work: dict[Any, tuple[Any, str]] = {}
        self._numbers = count()

    def start(self) -> None:
        import ray

        name = f"{self._plan.pool}-{(number := next(self._numbers))}"
        environment = {}
        if self._plan.address is not None and "PYTHONPATH" in os.environ:
            environment = {"runtime_env": {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}}
        actor: Any = (
            ray.remote(FanOutWorker)
            .options(
                name=f"{self._plan.title} {self._plan.pool} {number}",
                num_cpus=self._plan.cpus,
                num_gpus=self._plan.gpus,
                **environment,
            )
            .remote()
        )
        self._at_work[actor.work.remote(str(self._plan_file), name)] = (actor, name)

    def replace_ended(self) -> int:
        """Wait for _POLL_SECONDS, and replace the actors that ended before the work did; returns how many."""
        import ray

        for actor, name in self._at_work.values():
            if self._pool.has_to_end(name):
                ray.kill(actor)
        ended, _ = ray.wait(list(self._at_work), num_returns=len(self._at_work), timeout=_POLL_SECONDS)
        for reference in ended:
            _, name = self._at_work.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                print(f"{name}: {error}", flush=True)
                self._pool.mark_ended(name, f"Ray says: {type(error).__name__}")
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
    context = ray.init(
        plan.address or wait_for_address(pool.workers / f"{plan.pool}.address"),
        namespace=NAMESPACE,
        log_to_driver=False,
        job_config=ray.job_config.JobConfig(metadata={"job_name": plan.title}),
    )
    if context.dashboard_url:
        publish_text_once(pool.workers / f"{plan.pool}.dashboard", f"http://{context.dashboard_url}")
    with _shown_metrics(plan):
        actors = _Actors(plan_file, pool, plan)
        for _ in range(plan.workers):
            actors.start()
        limit = ReplacementLimit(pool, plan.workers)
        while not pool.nothing_left():
            try:
                limit.add(actors.replace_ended())
            except FanOutFailed as failure:
                pool.give_up(str(failure))
                return


def _shown_metrics(plan: RayWork) -> AbstractContextManager[None]:
    if not plan.metrics:
        return nullcontext()
    samples = import_function(plan.metrics)
    return published_in_ray(lambda: samples(Path(plan.metrics_of)))
