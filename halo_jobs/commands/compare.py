"""halo compare: recipes and results of two runs side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from halo_cluster import RunFolder
from halo_cluster.run_folder import RECIPE_FILE
from halo_jobs.commands.consoles import console
from halo_reports.monitoring.readings import check_run

if TYPE_CHECKING:
    from halo_reports.run_facts import RunFacts

_UNKNOWN = "-"


def compare(
    run_a: Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo.")],
    run_b: Annotated[Path, typer.Argument(help="Another run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Show where the recipes of two runs differ, and their results so far side by side."""
    from halo_jobs.recipe import differences
    from halo_reports.run_facts import load_run

    recipes, facts = [], []
    for folder in (run_a, run_b):
        check_run(folder)
        recipes.append(yaml.safe_load((folder / RECIPE_FILE).read_text()))
        stages = {record.stage: record.folder for record in RunFolder(folder).planned()}
        facts.append(dict(_results(load_run(folder, stages))))
    recipe = {key: [a, b] for key, a, b in differences(*recipes)}
    names = [*facts[0], *(name for name in facts[1] if name not in facts[0])]
    results = {name: [fact.get(name) for fact in facts] for name in names}
    if as_json:
        print(json.dumps({"runs": [str(run_a), str(run_b)], "recipe": recipe, "results": results}, indent=2))
        return
    sheet = console if console.is_terminal else Console(width=200)
    for title, rows in (("recipe", recipe), ("results", results)):
        table = Table(title, str(run_a), str(run_b))
        for key, values in rows.items():
            table.add_row(key, *map(_shown, values))
        sheet.print(table)


def _results(run: RunFacts) -> Iterator[tuple[str, Any]]:
    """Name and value of what came out of a run, stage after stage."""
    for stage, curve in run.curves.items():
        yield f"{stage} steps", len(curve.steps)
        yield f"{stage} final loss", curve.final_loss
    if run.selection:
        yield "attention layers", list(run.selection.attention_layers)
    for variant, calibration in run.calibrations.items():
        yield f"{variant} logits scaling base", calibration.base
    for model, evaluation in run.evaluations.items():
        yield f"{model} needles", evaluation.needle_recall(0, max(evaluation.niah_contexts, default=0))
        yield f"{model} perplexity", evaluation.perplexity
        for task, metrics in evaluation.tasks.items():
            if "score" in metrics:
                yield f"{model} {task}", metrics["score"]
    for record in run.stages:
        yield f"{record.name} seconds", record.seconds


def _shown(value: Any) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value:.4g}" if isinstance(value, float) else str(value)
