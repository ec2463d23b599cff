"""Workers as Ray actors.

Ray may end the process that imports it, so a child of the caller (`main`) connects to Ray and keeps the actors at work.
It may be ended at any time: its actors end with it, and the results that they published stay.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from durable_files import publish_text_once
from halo_cluster.children import Child, end_children, end_with_parent, start_child
from halo_cluster.fan_out.plan import import_function
from halo_cluster.fan_out.ray_cluster import RayCluster, wait_for_address, without_usage_statistics
from halo_cluster.fan_out.task_pool import TaskPool
from halo_cluster.fan_out.worker import open_pool, work
from halo_cluster.fan_out.worker_pools import GRACE_SECONDS, Launch, WorkerPool, fan_out_command, unique_name
from halo_cluster.ray_metrics import published_in_ray

_POLL_SECONDS = 0.5
_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)  # so that the attempt's log has it


@dataclass(frozen=True)
class RayActors:
    """`workers` actors of the cluster at `address`, or of one that is started for them (ray_cluster.py).

    A cluster that is joined may require a token: Ray reads RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH. Workers import our
    code and write results to the task pool's folder, so the nodes need both at the same paths.

    `metrics` names a function "module:function" that returns the samples of the folder `metrics_of` (ray_metrics.py);
    Ray's dashboards show them while the tasks run.
    """

    workers: int
    address: str | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    metrics: str = ""
    metrics_of: str = ""

    def worker_pool(self, launch: Launch) -> WorkerPool:
        if importlib.util.find_spec("ray") is None:
            raise ValueError("Ray is not installed here; pip install 'hypenet-megatron[ray]'")
        return _RayPool(self, launch)


class _RayPool:
    def __init__(self, backend: RayActors, launch: Launch) -> None:
        self._backend = backend
        self._launch = launch
        self._cluster: RayCluster | None = None
        self._driver: Child | None = None
        self._name = ""
        self._has_logged_dashboard = False

    def ensure_running(self) -> None:
        headless = self._cluster is not None and not self._cluster.has_head
        ended = self._driver is not None and self._driver.poll() is not None
        if headless or (ended and not self._launch.pool.nothing_left()):
            self._launch.pool.mark_ended(self._name, "it ended before the work did")
            self.end()
        if self._driver is None:
            self._start()
        self._log_dashboard()

    def _start(self) -> None:
        self._name = unique_name("ray")
        self._has_logged_dashboard = False
        backend, workers = self._backend, self._launch.pool.workers
        environment = without_usage_statistics(os.environ)
        if backend.address is None:
            self._cluster = RayCluster(workers, self._name, backend.workers * backend.cpus_per_worker)
            environment = self._cluster.environment
        arguments = (self._launch.plan_file, self._name, self._launch.name, json.dumps(asdict(backend)))
        command = fan_out_command("ray-driver", *arguments)
        self._driver = start_child(command, log=workers / f"{self._name}.log", environment=environment)

    def _log_dashboard(self) -> None:
        file = self._launch.pool.workers / f"{self._name}.dashboard"
        if self._cluster is not None and not self._has_logged_dashboard and file.exists():
            self._has_logged_dashboard = True
            _log.info("Ray's dashboard is at %s, its token in %s", file.read_text(), self._cluster.token)

    def end(self) -> None:
        """The actors end with the driver."""
        if self._driver is not None:
            end_children([self._driver], GRACE_SECONDS)
            for worker in self._launch.pool.workers_named(f"{self._name}-"):
                self._launch.pool.mark_ended(worker, "its Ray driver ended")
        if self._cluster is not None:
            self._cluster.end()
        self._driver = self._cluster = None


class FanOutWorker:
    """What the actors are."""

    def work(self, plan_file: str, name: str) -> None:
        work(open_pool(Path(plan_file)), name)


def main(plan_file: str, name: str, title: str, backend_json: str) -> None:
    """The process that is connected to Ray. Workers are called `name` and a number; Ray shows `title`."""
    end_with_parent()
    import ray

    backend = RayActors(**json.loads(backend_json))
    pool = open_pool(Path(plan_file))
    context = ray.init(
        backend.address or wait_for_address(pool.workers / f"{name}.address"),
        namespace="halo",
        log_to_driver=False,
        job_config=ray.job_config.JobConfig(metadata={"job_name": title}),
    )
    if context.dashboard_url:
        publish_text_once(pool.workers / f"{name}.dashboard", f"http://{context.dashboard_url}")
    metrics: AbstractContextManager[None] = nullcontext()
    if backend.metrics:
        samples = import_function(backend.metrics)
        metrics = published_in_ray(lambda: samples(Path(backend.metrics_of)))
    options: dict[str, Any] = {"num_cpus": backend.cpus_per_worker, "num_gpus": backend.gpus_per_worker}
    # Workers of a cluster of ours inherit PYTHONPATH. So they can be processes that Ray has started in advance, which
    # have no environment of their own.
    if backend.address is not None and "PYTHONPATH" in os.environ:
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
    with metrics:
        _keep_at_work(pool, plan_file, backend.workers, name, title, options)


def _keep_at_work(
    pool: TaskPool, plan_file: str, workers: int, name: str, title: str, options: dict[str, Any]
) -> None:
    """Replace actors that end, until no task is left."""
    import ray

    at_work: dict[Any, tuple[Any, str]] = {}  # actor and worker by the reference of the actor's `work` call
    numbers = count()
    while not pool.nothing_left():
        while len(at_work) < workers:
            number = next(numbers)
            actor: Any = ray.remote(FanOutWorker).options(name=f"{title} {name} {number}", **options).remote()
            worker = f"{name}-{number}"
            at_work[actor.work.remote(plan_file, worker)] = (actor, worker)
        for actor, worker in at_work.values():
            if pool.has_to_end(worker):
                ray.kill(actor)
        ended, _ = ray.wait(list(at_work), num_returns=len(at_work), timeout=_POLL_SECONDS)
        for reference in ended:
            _, worker = at_work.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                print(f"{worker}: {error}", flush=True)
                pool.mark_ended(worker, f"Ray says: {type(error).__name__}")
