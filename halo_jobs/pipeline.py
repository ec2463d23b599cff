"""Runs a recipe: every stage to its DONE.json, then the report. The same call resumes a run that was stopped."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from halo_cluster import (
    Attempt,
    PlannedStage,
    RunFolder,
    StageRecord,
    StageResult,
    run_stages,
    storage_errors,
)
from halo_cluster.jobs import StageJob
from halo_cluster.reconcile import Patience, Reconciler, submit_chain
from halo_cluster.slurm import Slurm, SlurmSettings
from halo_cluster.slurm.queue import cancel, live_jobs
from halo_jobs.checks import about, check_recipe
from halo_jobs.estimate import training_costs
from halo_jobs.graph import StageNode, input_hashes, stage_nodes
from halo_jobs.recipe import Recipe, recipe_yaml
from halo_jobs.stages.context import StageContext, layout_of
from halo_jobs.worker import run_in_processes
from halo_reports.build import build_report
from hypenet_megatron.runtime import ONE_PROCESS, model_parallel, reset_seeds


@dataclass(frozen=True)
class RunResult:
    """Where things are: finished stage folders by name, and the report."""

    stage_folders: Mapping[str, Path]
    report: Path


def _records(run: RunFolder, recipe: Recipe, nodes: list[StageNode]) -> dict[str, StageRecord]:
    hashes = input_hashes(recipe, nodes)
    return {node.name: run.stage(node.name, hashes[node.name]) for node in nodes}


def _work(node: StageNode, recipe: Recipe, records: Mapping[str, StageRecord]) -> dict[str, Any]:
    """All that a process needs to know to run the stage (JSON)."""
    return {
        "stage": node.name,
        "recipe": recipe.model_dump(mode="json"),
        "folder": str(records[node.name].folder.resolve()),
        "inputs": {name: str(records[name].folder.resolve()) for name in node.depends_on},
        "processes": recipe.layout.processes if node.trains else 1,
    }


def _run_stage(
    node: StageNode,
    recipe: Recipe,
    records: Mapping[str, StageRecord],
    console: Console,
    device: torch.device,
    attempt: Attempt,
) -> StageResult:
    folder, processes = attempt.record.folder, recipe.layout.processes
    inputs = {name: records[name].folder for name in node.depends_on}
    if node.trains and processes > 1:
        # One of the processes has the GPU that this one has computed on. Models refer to themselves, by their hooks.
        gc.collect()
        torch.cuda.empty_cache()
        # Under the same names as here: outputs are looked for in the folder that the attempt knows.
        places = {"folder": str(folder), "inputs": {name: str(path) for name, path in inputs.items()}}
        return run_in_processes(attempt.folder, _work(node, recipe, records) | places, processes)
    reset_seeds(recipe.seed)
    layout = layout_of(recipe) if node.trains else ONE_PROCESS
    return node.run(StageContext(node.name, recipe, folder, inputs, console, device, attempt, layout))


def run_recipe(recipe: Recipe, runs: Path, console: Console) -> RunResult:
    """Bring every stage of `recipe` to DONE in `runs`/<recipe name> and write report.html there."""
    check_recipe(recipe)
    run = RunFolder(runs / recipe.name)
    nodes = stage_nodes(recipe)
    records = _records(run, recipe, nodes)
    with run.opened(recipe_yaml(recipe)), model_parallel(seed=recipe.seed) as device:
        planned = [
            PlannedStage(
                node.name,
                records[node.name],
                partial(_run_stage, node, recipe, records, console, device),
                node.depends_on,
            )
            for node in nodes
        ]
        run_stages(planned, console)
        return _finished(run, records)


def _finished(run: RunFolder, records: Mapping[str, StageRecord]) -> RunResult:
    folders = {name: record.folder for name, record in records.items()}
    with storage_errors(run.folder):
        report = build_report(run.folder, folders, run.folder / "report.html")
    return RunResult(folders, report)


def _slurm(recipe: Recipe, retries_by_job: int = 0) -> Slurm:
    settings = SlurmSettings(**recipe.cluster.model_dump(exclude={"retries", "backoff_seconds"}))
    with about("cluster"):
        settings.check()
    return Slurm(settings, (sys.executable, "-m", "halo_jobs.stage_job"), retries_by_job)


def _stage_jobs(recipe: Recipe, records: Mapping[str, StageRecord], nodes: list[StageNode]) -> list[StageJob]:
    if recipe.layout.processes % recipe.cluster.nodes:
        raise ValueError(
            f"layout.processes {recipe.layout.processes} is not a multiple of cluster.nodes {recipe.cluster.nodes}"
        )
    jobs = []
    for node in nodes:
        work = _work(node, recipe, records)
        jobs.append(StageJob(node.name, records[node.name], work, work["processes"], node.depends_on))
    return jobs


def run_recipe_on_slurm(
    recipe: Recipe, runs: Path, console: Console, *, detach: bool = False
) -> RunResult | None:
    """As `run_recipe`, every stage a job of Slurm. With `detach`, submit them all and return None."""
    check_recipe(recipe)
    run = RunFolder(runs / recipe.name)
    nodes = stage_nodes(recipe)
    records = _records(run, recipe, nodes)
    jobs = _stage_jobs(recipe, records, nodes)
    run.prepare(recipe_yaml(recipe))
    if detach:
        submitted = submit_chain(jobs, _slurm(recipe, recipe.cluster.retries))
        for name, job in submitted.items():
            console.print(f"{name}: job {job}", highlight=False)
        return None
    patience = Patience(recipe.cluster.retries, recipe.cluster.backoff_seconds)
    Reconciler(jobs, _slurm(recipe), console, patience).run()
    return _finished(run, records)


def print_batch_script(recipe: Recipe, runs: Path, console: Console) -> None:
    """The script that the largest stage would be submitted with."""
    nodes = stage_nodes(recipe)
    records = _records(RunFolder(runs / recipe.name), recipe, nodes)
    jobs = _stage_jobs(recipe, records, nodes)
    job = max(jobs, key=lambda job: job.processes)
    console.print(f"\nBatch script of stage {job.name}:", highlight=False)
    console.print(_slurm(recipe).preview(job), markup=False, highlight=False, soft_wrap=True)


def cancel_run(run_folder: Path, stage: str | None) -> list[str]:
    """End the jobs of a run, or of one of its stages, whose names Slurm still has; returns their ids."""
    live = live_jobs()
    records = (StageRecord(folder) for folder in run_folder.glob("*/*") if (folder / "jobs").is_dir())
    wanted = (
        StageJob(record.stage, record, {}).job_name for record in records if stage in (None, record.stage)
    )
    jobs = [entry.job for name in wanted for entry in live.get(name, [])]
    cancel(jobs)
    return jobs


def print_plan(recipe: Recipe, runs: Path, console: Console) -> None:
    """What `run_recipe` would do: stages with their state, and the cost of the training ones. Writes nothing."""
    shape = check_recipe(recipe)
    run = RunFolder(runs / recipe.name)
    nodes = stage_nodes(recipe)
    records = _records(run, recipe, nodes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    costs = {cost.stage: cost for cost in training_costs(recipe, shape, device)}
    table = Table(
        title=f"{recipe.name}: {shape.num_layers} layers, hidden {shape.hidden_size}, on {device.type}"
    )
    for column in ("stage", "state", "trainable / all parameters", "memory", "tokens", "about"):
        table.add_column(column, justify="left" if column in ("stage", "state") else "right")
    for node in nodes:
        state = "done" if records[node.name].done() else "to do"
        cost = costs.get(node.name)
        numbers = (
            (
                f"{cost.trainable / 1e6:,.1f} / {cost.parameters / 1e6:,.1f} M",
                f"{cost.memory_bytes / 2**30:,.1f} GiB",
                f"{cost.tokens:,}",
                f"{cost.seconds / 60:,.1f} min",
            )
            if cost
            else ("", "", "", "")
        )
        table.add_row(node.name, state, *numbers)
    console.print(table)
    total = sum(cost.seconds for cost in costs.values())
    console.print(
        f"Training about {total / 60:,.1f} min in all; evaluation comes on top. Run folder: {run.folder}"
    )
