"""The Prometheus metrics of a run. Their names are stable.

docs/watching.md has the same table. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from halo_cluster import AttemptState
from halo_cluster.ray_metrics import Sample
from halo_reports.monitoring.readings import StageReading, StageState, find_runs, read_run


class MetricName(NamedTuple):
    """A metric, with the field of a StageReading that it shows. It is absent while the field is None."""

    name: str
    help: str
    field: str = ""
    labels: tuple[str, ...] = ("run", "stage")


PER_STAGE = (
    MetricName("halo_stage_progress_ratio", "Share of the stage that is done, 0 to 1.", "progress"),
    MetricName("halo_stage_seconds", "Wall time over all attempts, in seconds.", "seconds"),
    MetricName(
        "halo_stage_seconds_left", "Estimated seconds until the stage is done, while it runs.", "seconds_left"
    ),
    MetricName("halo_step", "Finished training steps.", "step"),
    MetricName("halo_steps", "Total training steps.", "steps"),
    MetricName("halo_loss", "Training loss of the newest step, while it runs.", "loss"),
    MetricName("halo_learning_rate", "Learning rate of the newest step, while it runs.", "learning_rate"),
    MetricName(
        "halo_gradient_norm",
        "Gradient norm of the newest step before clipping, while it runs.",
        "gradient_norm",
    ),
    MetricName(
        "halo_tokens_per_second",
        "Training tokens per second since the attempt started, while it runs.",
        "tokens_per_second",
    ),
    MetricName("halo_sweep_tasks_done", "Finished tasks of select and evaluate stages.", "tasks_done"),
    MetricName("halo_sweep_tasks", "Total tasks of select and evaluate stages.", "tasks"),
    MetricName("halo_checkpoint_step", "Step of the newest training checkpoint.", "checkpoint_step"),
    MetricName(
        "halo_checkpoint_age_seconds",
        "Seconds since the newest training checkpoint was published.",
        "checkpoint_age_seconds",
    ),
    MetricName(
        "halo_heartbeat_age_seconds",
        "Seconds since the last heartbeat of the stage, while it runs.",
        "heartbeat_age_seconds",
    ),
    MetricName(
        "halo_gpu_memory_bytes",
        "Peak GPU memory of the tensors of rank 0, while it runs; absent without CUDA.",
        "gpu_memory_bytes",
    ),
    MetricName(
        "halo_host_memory_bytes", "Peak resident host memory of rank 0, while it runs.", "host_memory_bytes"
    ),
    MetricName("halo_attempts_total", "Attempts started.", "attempts"),
    MetricName("halo_restarts_total", "Attempts after the first.", "restarts"),
)
# Fields that keep their last value. Their metrics end with the stage.
_WHILE_RUNNING = {
    "loss", "learning_rate", "gradient_norm", "tokens_per_second", "gpu_memory_bytes", "host_memory_bytes",
}  # fmt: skip
STAGE_STATE = MetricName(
    "halo_stage_state", "1 for the state of the stage, 0 for other states.", labels=("run", "stage", "state")
)
STAGE_INFO = MetricName(
    "halo_stage_info",
    "1, with the newest attempt, its node and the last failure as labels.",
    labels=("run", "stage", "node", "attempt", "reason"),
)
RUN_READABLE = MetricName(
    "halo_run_readable", "1 if the run folder is readable, otherwise 0.", labels=("run",)
)
ALL_METRICS = (*PER_STAGE, STAGE_STATE, STAGE_INFO, RUN_READABLE)
STATES: tuple[StageState, ...] = (*get_args(AttemptState), "pending")


class RunCollector:
    """Collects the metrics of all runs in `folder`. Reads their folders at every scrape."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Metric]:
        families = {metric.name: _family(metric) for metric in ALL_METRICS}
        for run in find_runs(self.folder):
            name = run.resolve().name
            try:
                stages = read_run(run)
            except (OSError, ValueError):
                stages = []  # being removed, or on a disk that is not mounted; other runs are still reported
                families[RUN_READABLE.name].add_metric([name], 0)
            else:
                families[RUN_READABLE.name].add_metric([name], 1)
            for stage in stages:
                _add(families, name, stage)
        yield from families.values()


def _family(metric: MetricName) -> GaugeMetricFamily | CounterMetricFamily:
    family = CounterMetricFamily if metric.name.endswith("_total") else GaugeMetricFamily
    return family(metric.name, metric.help, labels=metric.labels)


def _add(families: dict[str, GaugeMetricFamily | CounterMetricFamily], run: str, stage: StageReading) -> None:
    for metric in PER_STAGE:
        value = getattr(stage, metric.field)
        if value is not None and (stage.state == "running" or metric.field not in _WHILE_RUNNING):
            families[metric.name].add_metric([run, stage.stage], value)
    for state in STATES:
        families[STAGE_STATE.name].add_metric([run, stage.stage, state], float(stage.state == state))
    families[STAGE_INFO.name].add_metric([run, stage.stage, stage.node, stage.attempt, stage.reason], 1.0)


def ray_samples(folder: Path) -> list[Sample]:
    """The same metrics for Ray. All are gauges, because the value of a counter cannot be set there."""
    return [
        Sample(sample.name, sample.labels, sample.value)
        for family in RunCollector(folder).collect()
        for sample in family.samples
    ]
