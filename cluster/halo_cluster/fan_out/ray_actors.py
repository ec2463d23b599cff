"""Workers as Ray actors. Only a child imports Ray (ray_driver.py), because Ray may end the process that does."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from halo_cluster.children import Child, end_children, start_child
from halo_cluster.fan_out.ray_cluster import RayCluster, without_usage_statistics
from halo_cluster.fan_out.ray_driver import RayWork
from halo_cluster.fan_out.worker_pools import (
    GRACE_SECONDS,
    Launch,
    WorkerPool,
    fan_out_command,
    unique_name,
)

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

    @contextmanager
    def worker_pool(self, launch: Launch) -> Iterator[WorkerPool]:
        if importlib.util.find_spec("ray") is None:
            raise ValueError("Ray is not installed here; pip install 'hypenet-megatron[ray]'")
        pool = _RayPool(self, launch)
        try:
            yield pool
        finally:
            pool.end()


class _RayPool:
    def __init__(self, backend: RayActors, launch: Launch) -> None:
        self._backend = backend
        self._launch = launch
        self._cluster: RayCluster | None = None
        self._driver: Child | None = None
        self._name = ""
        self._has_logged_dashboard = False

    def ensure_running(self) -> int:
        if self._driver is None:
            self._start()
            return 0
        headless = self._cluster is not None and not self._cluster.has_head
        if headless or (self._driver.poll() is not None and not self._launch.pool.nothing_left()):
            self.end()
            self._start()
            return 1
        self._log_dashboard()
        return 0

    def _start(self) -> None:
        self._name = unique_name("ray")
        self._has_logged_dashboard = False
        backend, workers = self._backend, self._launch.pool.workers
        environment = without_usage_statistics(os.environ)
        if backend.address is None:
            self._cluster = RayCluster(workers, self._name, backend.workers * backend.cpus_per_worker)
            environment = self._cluster.environment
        work = RayWork(
            address=backend.address,
            pool=self._name,
            title=self._launch.name,
            workers=backend.workers,
            cpus=backend.cpus_per_worker,
            gpus=backend.gpus_per_worker,
            metrics=backend.metrics,
            metrics_of=backend.metrics_of,
        )
        command = fan_out_command("ray-driver", self._launch.plan_file, json.dumps(asdict(work)))
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
        if self._cluster is not None:
            self._cluster.end()
        for worker in self._launch.pool.workers_named(f"{self._name}-"):
            self._launch.pool.mark_ended(worker, "its Ray driver ended")
        self._driver = self._cluster = None
