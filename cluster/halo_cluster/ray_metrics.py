"""Custom metrics on Ray's dashboards. Ray prefixes their names with `ray_` and exports them to Prometheus."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

PUBLISH_SECONDS = 5.0


@dataclass(frozen=True)
class Sample:
    """One value of one metric. All samples of a name have the same label names."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass
class RayGauges:
    """Shows the samples of the newest `publish` as gauges of the Ray cluster that this process has joined, if any."""

    _gauges: dict[str, Any] = field(default_factory=dict)
    _shown: set[tuple[str, frozenset[tuple[str, str]]]] = field(default_factory=set)

    def publish(self, samples: Iterable[Sample]) -> None:
        ray = sys.modules.get("ray")  # a process that has not imported Ray is not connected
        if ray is None or not ray.is_initialized():
            return
        from ray.util.metrics import Gauge

        shown = set()
        for sample in samples:
            if sample.name not in self._gauges:
                self._gauges[sample.name] = Gauge(sample.name, tag_keys=tuple(sample.labels))
            self._gauges[sample.name].set(sample.value, tags=dict(sample.labels))
            shown.add((sample.name, frozenset(sample.labels.items())))
        for name, labels in self._shown - shown:
            self._gauges[name].set(math.nan, tags=dict(labels))  # the only way to remove a series from Ray
        self._shown = shown


@contextmanager
def published_in_ray(read: Callable[[], Iterable[Sample]]) -> Iterator[None]:
    """While the block runs, a thread publishes what `read` returns every PUBLISH_SECONDS, and once more at the end."""
    gauges, ended = RayGauges(), threading.Event()

    def publish_until_ended() -> None:
        is_last = False
        while not is_last:
            is_last = ended.wait(PUBLISH_SECONDS)
            with suppress(Exception):  # an error of the monitoring must not end the work
                gauges.publish(read())

    thread = threading.Thread(target=publish_until_ended, name="ray-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
