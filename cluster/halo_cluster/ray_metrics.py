"""Custom metrics on Ray's dashboards. Ray puts `ray_` before their names and serves them to Prometheus itself."""

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
    """The samples of the newest `publish`, as gauges of the Ray cluster that this process is connected to, if it is."""

    _gauges: dict[str, Any] = field(default_factory=dict)
    _shown: set[tuple[str, frozenset[tuple[str, str]]]] = field(default_factory=set)

    def publish(self, samples: Iterable[Sample]) -> None:
        ray = sys.modules.get("ray")  # who has not imported it is not connected
        if ray is None or not ray.is_initialized():
            return
        shown = set()
        for sample in samples:
            self._gauge(sample).set(sample.value, tags=dict(sample.labels))
            shown.add((sample.name, frozenset(sample.labels.items())))
        for name, labels in self._shown - shown:
            self._gauges[name].set(math.nan, tags=dict(labels))  # Ray forgets a series by this alone
        self._shown = shown

    def _gauge(self, sample: Sample) -> Any:
        from ray.util.metrics import Gauge

        if sample.name not in self._gauges:
            self._gauges[sample.name] = Gauge(sample.name, tag_keys=tuple(sample.labels))
        return self._gauges[sample.name]


@contextmanager
def published_in_ray(read: Callable[[], Iterable[Sample]]) -> Iterator[None]:
    """While the body runs, a thread publishes what `read` returns every few seconds, and once more at the end."""
    gauges, ended = RayGauges(), threading.Event()

    def publish() -> None:
        with suppress(Exception):  # looking on must not end what is looked at
            gauges.publish(read())

    def publish_until_ended() -> None:
        while not ended.wait(PUBLISH_SECONDS):
            publish()

    thread = threading.Thread(target=publish_until_ended, name="ray-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        publish()
