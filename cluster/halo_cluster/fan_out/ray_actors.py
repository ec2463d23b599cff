"""Workers as Ray actors. The caller never imports Ray: a child does (ray_crew.py), for Ray may end its process."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from halo_cluster.fan_out.crews import Crew, Launch, end_processes, new_name
from halo_cluster.fan_out.ray_cluster import RayCluster, without_usage_statistics
from halo_cluster.fan_out.ray_crew import RayWork

_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)  # for the attempt's log


@dataclass(frozen=True)
class RayActors:
    """`workers` actors of the cluster at `address`, or of one that is started for them (ray_cluster.py).

    A cluster that is joined may ask for a token: RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH are Ray's own. Results go
    through the pool's folder and the code is imported, so the nodes need both at the same paths.

    `metrics` names a function "module:function" that returns the samples of the folder `metrics_of` (ray_metrics.py);
    Ray's dashboards show them meanwhile.
    """

    workers: int
    address: str | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    metrics: str = ""
    metrics_of: str = ""

    @contextmanager
    def crew(self, launch: Launch) -> Iterator[Crew]:
        if importlib.util.find_spec("ray") is None:
            raise ValueError("Ray is not installed here; pip install 'hypenet-megatron[ray]'")
        crew = _RayCrew(self, launch)
        try:
            yield crew
        finally:
            crew.end()


class _RayCrew:
    def __init__(self, backend: RayActors, launch: Launch) -> None:
        self._backend = backend
        self._launch = launch
        self._cluster: RayCluster | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._name = ""

    def tend(self) -> int:
        if self._child is None:
            self._start()
            return 0
        headless = self._cluster is not None and not self._cluster.has_head
        if headless or (self._child.poll() is not None and not self._launch.pool.nothing_left()):
            self.end()
            self._start()
            return 1
        return 0

    def _start(self) -> None:
        self._name = new_name("ray")
        backend, pool = self._backend, self._launch.pool
        environment = without_usage_statistics(os.environ)
        address = backend.address
        if address is None:
            cpus = backend.workers * backend.cpus_per_worker
            self._cluster = RayCluster(pool.workers, self._name, cpus)
            environment, address = self._cluster.environment, self._cluster.address
            _log.info(
                "Ray's dashboard is at %s, its token in %s", self._cluster.dashboard, self._cluster.token
            )
        work = RayWork(
            address=address,
            crew=self._name,
            shown=self._launch.name,
            workers=backend.workers,
            cpus=backend.cpus_per_worker,
            gpus=backend.gpus_per_worker,
            joined=backend.address is not None,
            metrics=backend.metrics,
            metrics_of=backend.metrics_of,
        )
        module = [sys.executable, "-m", "halo_cluster.fan_out", "ray-crew", str(self._launch.plan_file)]
        with open(pool.workers / f"{self._name}.log", "ab") as log:
            self._child = subprocess.Popen(
                [*module, json.dumps(asdict(work))],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def end(self) -> None:
        """The child's actors end with it."""
        if self._child is not None:
            end_processes([self._child])
        if self._cluster is not None:
            self._cluster.end()
        for worker in self._launch.pool.workers_named(f"{self._name}-"):
            self._launch.pool.ended(worker, "its Ray crew ended")
        self._child = self._cluster = None
