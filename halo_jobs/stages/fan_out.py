"""Runs the tasks of a stage on the backend of the recipe's `fan_out` section, and sets up its workers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from rich.console import Console

from halo_cluster import StageRecord
from halo_cluster.fan_out import (
    Backend,
    LocalProcesses,
    Plan,
    RayActors,
    SlurmArray,
    Task,
    ThisProcess,
    fan_out,
)
from halo_jobs.attempt import JoinedAttempt
from halo_jobs.recipe import Recipe
from halo_jobs.stages.context import StageContext
from halo_jobs.work import StageWork
from halo_training.progress import ProgressReporter
from hypenet_megatron.runtime import model_parallel

_for_the_process = ExitStack()


def has_workers(recipe: Recipe) -> bool:
    """Whether tasks run in processes other than the stage's own."""
    return recipe.fan_out.backend != "local" or recipe.fan_out.workers > 1


def backend_of(recipe: Recipe, run: Path) -> Backend:
    """The fan-out backend of `recipe`. Ray's dashboards show the metrics of the run folder `run`."""
    section = recipe.fan_out
    if section.backend == "ray":
        return RayActors(
            section.workers,
            section.ray_address,
            section.cpus_per_worker,
            section.gpus_per_worker,
            metrics="halo_reports.monitoring.families:ray_samples",
            metrics_of=str(run.resolve()),
        )
    if section.backend == "slurm-array":
        resources = (section.cpus_per_worker, section.gpus_per_worker, section.memory_gb_per_worker)
        return SlurmArray(section.workers, recipe.cluster, *resources)
    if has_workers(recipe):
        return LocalProcesses(section.workers, section.gpus_per_worker)
    return ThisProcess()


def run_tasks(context: StageContext, folder: Path, worker: str, tasks: Sequence[Task]) -> dict[str, Any]:
    """Run `tasks` and return their results by task name. Each result is also kept as a file in `folder`.

    `worker` is the import path of a function that makes a worker from the setup, which `worker_context` reads.
    """
    setup = {**context.to_json(), "attempt": str(context.attempt.folder.resolve())}
    plan = Plan(worker, setup, tuple(tasks))
    reporter = ProgressReporter(context.name, len(tasks), context.console, context.folder)
    with reporter.live():
        return fan_out(
            folder,
            plan,
            backend_of(context.recipe, context.folder.parent.parent),
            name=f"{context.recipe.name} {context.name}",
            progress=reporter.update,
        )


def _device(seed: int) -> torch.device:
    """The device of this process. A worker sets up process groups once for all of its tasks."""
    if not parallel_state.model_parallel_is_initialized():
        return _for_the_process.enter_context(model_parallel(seed=seed))
    index = torch.cuda.current_device() if torch.cuda.is_available() else None
    return torch.device("cpu") if index is None else torch.device("cuda", index)


def worker_context(setup: Any) -> StageContext:
    """The stage's context in a worker of `run_tasks`."""
    work = StageWork.from_json(setup)
    joined = JoinedAttempt(StageRecord(work.folder), Path(setup["attempt"]), 0)
    device = _device(work.recipe.seed)
    return StageContext(**vars(work), console=Console(quiet=True), device=device, attempt=joined)
