"""The Prometheus metrics of a run: their names, which are stable, and what they are made of.

docs/watching.md has the same table; a test holds them equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from halo_cluster import AttemptState
from halo_cluster.ray_metrics import Sample
from halo_reports.monitoring.readings import StageReading, StageState, find_runs, read_run


@dataclass(frozen=True)
class MetricName:
    """A metric with the labels run and stage: one number of a StageReading, absent while that is None."""

    name: str
    help: str
    value: Callable[[StageReading], float | None]
    kind: Literal["gauge", "counter"] = "gauge"


def _while_running(value: Callable[[StageReading], float | None]) -> Callable[[StageReading], float | None]:
    return lambda stage: value(stage) if stage.state == "running" else None


PER_STAGE = (
    MetricName(
        "halo_stage_progress_ratio", "Share of the stage that is done, 0 to 1.", lambda stage: stage.progress
    ),
    MetricName("halo_stage_seconds", "Wall time over all attempts, in seconds.", lambda stage: stage.seconds),
    MetricName(
        "halo_stage_seconds_left",
        "Estimated seconds until the stage is done, while it runs.",
        lambda stage: stage.seconds_left,
    ),
    MetricName("halo_step", "Training steps done.", lambda stage: stage.step),
    MetricName("halo_steps", "Training steps in all.", lambda stage: stage.steps),
    MetricName(
        "halo_loss",
        "Training loss of the newest step, while it runs.",
        _while_running(lambda stage: stage.loss),
    ),
    MetricName(
        "halo_learning_rate",
        "Learning rate of the newest step, while it runs.",
        _while_running(lambda stage: stage.learning_rate),
    ),
    MetricName(
        "halo_gradient_norm",
        "Gradient norm of the newest step before clipping, while it runs.",
        _while_running(lambda stage: stage.gradient_norm),
    ),
    MetricName(
        "halo_tokens_per_second",
        "Training tokens per second since the attempt began, while it runs.",
        _while_running(lambda stage: stage.tokens_per_second),
    ),
    MetricName(
        "halo_sweep_tasks_done", "Tasks done, of select and evaluate stages.", lambda stage: stage.tasks_done
    ),
    MetricName("halo_sweep_tasks", "Tasks in all, of select and evaluate stages.", lambda stage: stage.tasks),
    MetricName(
        "halo_checkpoint_step", "Step of the newest training checkpoint.", lambda stage: stage.checkpoint_step
    ),
    MetricName(
        "halo_checkpoint_age_seconds",
        "Seconds since the newest training checkpoint was published.",
        lambda stage: stage.checkpoint_age_seconds,
    ),
    MetricName(
        "halo_heartbeat_age_seconds",
        "Seconds since the stage's process last showed that it lives, while it runs.",
        lambda stage: stage.heartbeat_age_seconds,
    ),
    MetricName(
        "halo_gpu_memory_bytes",
        "Peak of GPU memory in tensors of training process 0, while it runs; absent without CUDA.",
        _while_running(lambda stage: stage.gpu_memory_bytes),
    ),
    MetricName(
        "halo_host_memory_bytes",
        "Peak of resident host memory of training process 0, while it runs.",
        _while_running(lambda stage: stage.host_memory_bytes),
    ),
    MetricName("halo_attempts_total", "Attempts begun.", lambda stage: stage.attempts, "counter"),
    MetricName(
        "halo_restarts_total",
        "Attempts after the first.",
        lambda stage: max(0, stage.attempts - 1),
        "counter",
    ),
)
STAGE_STATE = MetricName(
    "halo_stage_state", "1 for the state that the stage is in, 0 for others.", lambda _: 1.0
)
STAGE_INFO = MetricName(
    "halo_stage_info", "1, with the newest attempt, its node and the last failure as labels.", lambda _: 1.0
)
RUN_READABLE = MetricName(
    "halo_run_readable", "1 if the run's folder could be read, otherwise 0.", lambda _: 1.0
)
EXTRA_LABELS = {
    STAGE_STATE.name: ("run", "stage", "state"),
    STAGE_INFO.name: ("run", "stage", "node", "attempt", "reason"),
    RUN_READABLE.name: ("run",),
}
"""Of the metrics that are not labelled run and stage alone."""
ALL_METRICS = (*PER_STAGE, STAGE_STATE, STAGE_INFO, RUN_READABLE)
STATES: tuple[StageState, ...] = (*get_args(AttemptState), "pending")


class RunCollector:
    """What Prometheus gets to see at each scrape: the runs of `folder`, read anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Metric]:
        families = {metric.name: _family(metric) for metric in ALL_METRICS}
        for run in find_runs(self.folder):
            name = run.resolve().name
            try:
                stages = read_run(run)
            except (OSError, ValueError):
                stages = []  # being removed, or on a disk that is away: the others are still there
                families[RUN_READABLE.name].add_metric([name], 0)
            else:
                families[RUN_READABLE.name].add_metric([name], 1)
            for stage in stages:
                _add(families, name, stage)
        yield from families.values()


def _family(metric: MetricName) -> GaugeMetricFamily | CounterMetricFamily:
    labels = EXTRA_LABELS.get(metric.name, ("run", "stage"))
    made = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return made(metric.name, metric.help, labels=labels)


def _add(families: dict[str, GaugeMetricFamily | CounterMetricFamily], run: str, stage: StageReading) -> None:
    for metric in PER_STAGE:
        value = metric.value(stage)
        if value is not None:
            families[metric.name].add_metric([run, stage.stage], value)
    for state in STATES:
        families[STAGE_STATE.name].add_metric([run, stage.stage, state], float(stage.state == state))
    families[STAGE_INFO.name].add_metric([run, stage.stage, stage.node, stage.attempt, stage.reason], 1.0)


def ray_samples(folder: Path) -> list[Sample]:
    """The same metrics for Ray's dashboards, which have no counters that are set: there they are gauges."""
    return [
        Sample(sample.name, sample.labels, sample.value)
        for family in RunCollector(folder).collect()
        for sample in family.samples
    ]
