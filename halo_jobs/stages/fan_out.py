"""A stage's tasks, wherever the recipe's `fan_out` section says: what workers are told, and who they are."""

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
from halo_cluster.slurm import SlurmSettings
from halo_jobs.attempt import JoinedAttempt
from halo_jobs.recipe import ConversionRecipe, Recipe, recipe_class
from halo_jobs.stages.context import StageContext, tokenizer_folder
from halo_training.progress import ProgressReporter
from hypenet_megatron.runtime import model_parallel

_for_the_process = ExitStack()


def has_workers(recipe: Recipe) -> bool:
    """Whether tasks are for others than the stage's own process."""
    return recipe.fan_out.backend != "local" or recipe.fan_out.workers > 1


def backend_of(recipe: Recipe, run: Path) -> Backend:
    """`run` is the folder whose metrics are shown where a backend has dashboards."""
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
        settings = SlurmSettings(**recipe.cluster.model_dump(exclude={"retries", "backoff_seconds"}))
        resources = (section.cpus_per_worker, section.gpus_per_worker, section.memory_gb_per_worker)
        return SlurmArray(section.workers, settings, *resources)
    if has_workers(recipe):
        return LocalProcesses(section.workers, section.gpus_per_worker)
    return ThisProcess()


def run_tasks(context: StageContext, folder: Path, worker: str, tasks: Sequence[Task]) -> dict[str, Any]:
    """Results by task name, kept in `folder`; `worker` is an import path, and its setup is for `worker_context`."""
    recipe = context.recipe.model_dump(mode="json")
    # Workers of a cluster that was joined began in another folder.
    key = "teacher" if isinstance(context.recipe, ConversionRecipe) else "tokenizer"
    recipe[key] = str(tokenizer_folder(context.recipe).resolve())
    setup = {
        "stage": context.name,
        "recipe": recipe,
        "folder": str(context.folder.resolve()),
        "inputs": {name: str(path.resolve()) for name, path in context.inputs.items()},
        "attempt": str(context.attempt.folder.resolve()),
    }
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
    """The stage's own process is laid out already; a worker's is once, and stays so."""
    if not parallel_state.model_parallel_is_initialized():
        return _for_the_process.enter_context(model_parallel(seed=seed))
    index = torch.cuda.current_device() if torch.cuda.is_available() else None
    return torch.device("cpu") if index is None else torch.device("cuda", index)


def recipe_of(setup: Any) -> Recipe:
    return recipe_class(setup["recipe"]).model_validate(setup["recipe"])


def worker_context(setup: Any) -> StageContext:
    """The stage as a worker of `run_tasks` sees it."""
    recipe = recipe_of(setup)
    inputs = {name: Path(folder) for name, folder in setup["inputs"].items()}
    folder, device = Path(setup["folder"]), _device(recipe.seed)
    joined = JoinedAttempt(StageRecord(folder), Path(setup["attempt"]), 0)
    return StageContext(setup["stage"], recipe, folder, inputs, Console(quiet=True), device, joined)
