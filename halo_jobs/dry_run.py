"""`halo run --dry-run`: what a run would keep, resume and begin, and why. Writes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from durable_files import read_json
from halo_cluster import RunFolder
from halo_cluster.run_folder import INPUTS_FILE
from halo_cluster.stage_id import StageId
from halo_jobs.checks import check_recipe
from halo_jobs.estimate import training_costs
from halo_jobs.plan import TOKENIZE, Plan, make_plan
from halo_jobs.recipe import ABSENT, Recipe, differences
from halo_jobs.sources import SourceChecksums
from halo_jobs.work import StageInputs
from halo_reports.monitoring.readings import newest_checkpoint

KEPT = "kept"


def stage_states(plan: Plan, run: RunFolder) -> dict[StageId, str]:
    """By stage: "kept", "resumes at step N", "resumes", or "new" with the reason."""
    states: dict[StageId, str] = {}
    for stage in plan.stages.values():
        record = stage.record(run)
        if record.done() is not None:
            states[stage.id] = KEPT
        elif record.attempts():
            step, _ = newest_checkpoint(record.folder)
            states[stage.id] = "resumes" if step is None else f"resumes at step {step}"
        else:
            reason = next(_reasons(stage, _latest_inputs(stage, run), states), None)
            states[stage.id] = f"new, because {reason}" if reason else "new"
    return states


def _latest_inputs(stage: StageInputs, run: RunFolder) -> StageInputs | None:
    """What the newest folder of this stage was made of."""
    files = (run.folder / stage.stage).glob(f"*/{INPUTS_FILE}")
    newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    return None if newest is None else StageInputs(**read_json(newest))


def _reasons(
    now: StageInputs, before: StageInputs | None, states: Mapping[StageId, str]
) -> Iterator[str]:
    """What changed since the stage was made of `before`: its settings first, then what it reads."""
    if before is None:
        return
    for key, old, new in differences(before.settings, now.settings):
        yield f"{key} changed from {_shown(old)} to {_shown(new)}"
    for key, digests in now.sources.items():
        if None in digests:
            yield f"the files of {key} have to be read first"
        elif digests != before.sources.get(key):
            yield f"the files of {key} changed"
    for other in now.depends_on:
        if before.stages.get(str(other)) != now.stages[str(other)]:
            yield f"{other} {'changed' if states[other] == KEPT else 'is new'}"


def _shown(value: Any) -> str:
    """A value as one would write it in a recipe."""
    return value if value is ABSENT else re.sub(r"e([+-])0(?=\d)", r"e\1", repr(value)).replace("e+", "e")


def print_plan(recipe: Recipe, runs: Path, console: Console) -> None:
    """Print the stages of `recipe` with their states, and the cost of those that train. Reads no source."""
    run = RunFolder(runs / recipe.name)
    plan = make_plan(recipe, SourceChecksums(run.folder).digest)
    states = stage_states(plan, run)
    shape = check_recipe(recipe, tokenized=states[TOKENIZE] == KEPT)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    costs = {cost.stage: cost for cost in training_costs(recipe, shape, device)}
    table = Table(
        title=f"{recipe.name}: {shape.num_layers} layers, hidden {shape.hidden_size}, on {device.type}"
    )
    for column in ("stage", "trainable / all parameters", "memory", "tokens", "about"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in plan.stages:
        cost = costs.get(str(stage))
        if cost is None:
            continue
        table.add_row(
            cost.stage,
            f"{cost.trainable / 1e6:,.1f} / {cost.parameters / 1e6:,.1f} M",
            f"{cost.memory_bytes / 2**30:,.1f} GiB",
            f"{cost.tokens:,}",
            f"{cost.seconds / 60:,.1f} min",
        )
    console.print(table)
    width = max(len(str(stage)) for stage in states)
    for stage, state in states.items():
        console.print(f"{stage!s:<{width}}  {state}", markup=False, highlight=False, soft_wrap=True)
    left = sum(cost.seconds for cost in costs.values() if states[StageId.parse(cost.stage)] != KEPT)
    console.print(
        f"Training that is left takes about {left / 60:,.1f} min; evaluation comes on top. Run folder: {run.folder}"
    )
