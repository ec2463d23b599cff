"""Runs a recipe: every stage to its DONE.json, then the report. The same call resumes a run that was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
from halo_jobs.checks import check_recipe
from halo_jobs.estimate import training_costs
from halo_jobs.graph import StageNode, input_hashes, stage_nodes
from halo_jobs.models import layout_of
from halo_jobs.recipe import Recipe, recipe_yaml
from halo_jobs.report import build_report
from halo_jobs.stages.context import StageContext
from halo_jobs.worker import run_in_processes
from hypenet_megatron.runtime import ONE_PROCESS, model_parallel, reset_seeds


@dataclass(frozen=True)
class RunResult:
    """Where things are: finished stage folders by name, and the report."""

    stage_folders: Mapping[str, Path]
    report: Path


def _records(run: RunFolder, recipe: Recipe, nodes: list[StageNode]) -> dict[str, StageRecord]:
    hashes = input_hashes(recipe, nodes)
    return {node.name: run.stage(node.name, hashes[node.name]) for node in nodes}


def _run_stage(
    node: StageNode,
    recipe: Recipe,
    records: Mapping[str, StageRecord],
    console: Console,
    device: torch.device,
    attempt: Attempt,
) -> StageResult:
    inputs = {name: records[name].folder for name in node.depends_on}
    folder, processes = attempt.record.folder, recipe.layout.processes
    if node.trains and processes > 1:
        work = {
            "stage": node.name,
            "recipe": recipe.model_dump(mode="json"),
            "folder": str(folder),
            "inputs": {name: str(path) for name, path in inputs.items()},
        }
        return run_in_processes(attempt.folder, work, processes)
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
        folders = {name: record.folder for name, record in records.items()}
        with storage_errors(run.folder):
            report = build_report(run.folder, folders, run.folder / "report.html")
    return RunResult(folders, report)


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
