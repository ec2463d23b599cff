"""Renders the report of a run as one self-contained HTML file."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from durable_files import write_text
from halo_cluster.stage_id import StageId
from halo_evaluation.results import Evaluation
from halo_reports import outcome, plots
from halo_reports.formatting import count, decimals, percent, render
from halo_reports.run_facts import FinishedStage, RunFacts, TrainingCurve, load_run
from terminal_output import duration

_LOSSES = {
    "pretrain": ("Pre-training", "cross entropy, nats per token"),
    "align": ("Align", "MSE of mixer outputs"),
    "distill": ("Distill", "KL to the teacher, nats per token"),
    "finetune": ("Finetune", "cross entropy, nats per token"),
}
_VERSIONED_PACKAGES = ("torch", "megatron-core", "transformers", "triton", "numpy", "zarr")
_OPEN_TABLE_LAYERS = 16


def build_report(run_folder: Path, stage_folders: Mapping[str, Path], out: Path) -> Path:
    """Write the report of a run to `out`. Returns `out`.

    `stage_folders` maps stage names ("align", "distill.hybrid", "evaluate.teacher", ...) to their folders. A missing
    file leaves out its section. Raises ValueError with the name of a malformed file.
    """
    run = load_run(run_folder, stage_folders)
    write_text(out, render("template.html", **_content(run)))
    return out


def _content(run: RunFacts) -> dict[str, Any]:
    return {
        "run": run,
        "headline": outcome.headline(run),
        "baseline_sentence": outcome.baseline_sentence(run),
        "selection_sentence": outcome.selection_sentence(run),
        "proxy_note": outcome.PROXY_NOTE,
        "tiles": _tiles(run),
        "stage_groups": _stage_groups(run),
        "loss_figures": _loss_figures(run),
        "importance_figure": plots.layer_importance(run.selection) if run.selection else None,
        "layer_rows": _layer_rows(run),
        "open_layer_table": run.selection is not None
        and run.selection.sweep.num_layers <= _OPEN_TABLE_LAYERS,
        "needles": _needles(run),
        "score_rows": outcome.score_rows(run),
        "calibration_figure": plots.calibration_curve(run.calibrations) if run.calibrations else None,
        "usage": outcome.usage_snippet(run.export_folder) if run.export_folder else None,
        "versions": _versions(),
    }


def _tiles(run: RunFacts) -> list[tuple[str, str, str]]:
    """(label, figure, comparison) of the main results."""
    tiles = _evaluation_tiles(run.evaluations.get("hybrid"), run.evaluations.get("teacher"), run.fair_context)
    if run.selection is not None:
        kept, layers = len(run.selection.attention_layers), run.selection.sweep.num_layers
        tiles.append(("Softmax attention kept", percent(kept / layers, 0), f"{kept} of {layers} layers"))
    if run.stages:
        main = sum(record.seconds for record in run.stages if not record.is_baseline)
        rest = run.seconds - main
        tiles.append(("Time", duration(main), f"baselines {duration(rest)}" if rest else "all stages"))
    return tiles


def _evaluation_tiles(
    hybrid: Evaluation | None, teacher: Evaluation | None, limit: int | None
) -> list[tuple[str, str, str]]:
    if hybrid is None or limit is None:
        return []
    longest = max(hybrid.niah_contexts, default=0)
    tiles = []
    for label, shortest, end in (
        (f"Needles found to {count(limit, 1024)}", 0, limit),
        (f"Needles found {count(limit, 1024)} to {count(longest, 1024)}", limit + 1, longest),
    ):
        share = hybrid.needle_recall(shortest, end)
        reference = teacher.needle_recall(shortest, end) if teacher else None
        if share is not None:
            tiles.append((label, percent(share), f"teacher {percent(reference)}"))
    if hybrid.perplexity is not None:
        reference = teacher.perplexity if teacher else None
        tiles.append(("Held-out perplexity", decimals(hybrid.perplexity), f"teacher {decimals(reference)}"))
    return tiles


def _stage_groups(run: RunFacts) -> list[dict[str, Any]]:
    """Groups of rows of the cost table: the stages of the hybrid, then the baselines."""
    longest = max((record.seconds for record in run.stages), default=0.0) or 1.0
    groups = []
    for title, baselines in (("Teacher and hybrid", False), ("Baselines, for comparison only", True)):
        records = [record for record in run.stages if record.is_baseline == baselines]
        if records:
            rows = [_stage_row(record, run.curves.get(record.name), longest) for record in records]
            groups.append(
                {"title": title, "rows": rows, "seconds": sum(record.seconds for record in records)}
            )
    return groups


def _stage_row(record: FinishedStage, curve: TrainingCurve | None, longest: float) -> dict[str, Any]:
    """`share` is the time relative to the longest stage."""
    return {
        "record": record,
        "share": record.seconds / longest,
        "steps": f"{curve.steps[-1]:,}" if curve else "",
        "tokens": count(curve.consumed_tokens) if curve else "",
        "speed": count(curve.median_tokens_per_second) if curve else "",
        "loss": f"{curve.final_loss:.4g}" if curve else "",
        "summary": json.dumps(record.summary, ensure_ascii=False) if record.summary else "",
    }


def _loss_figures(run: RunFacts) -> list[dict[str, Any]]:
    figures = []
    for family, (title, loss_name) in _LOSSES.items():
        curves = {
            stage.variant: curve
            for stage, curve in ((StageId.parse(name), curve) for name, curve in run.curves.items())
            if stage.kind == family
        }
        if curves:
            points = max(len(curve.steps) for curve in curves.values())
            figures.append(
                {"title": title, "figure": plots.loss_curves(title, loss_name, curves), "points": points}
            )
    return figures


def _layer_rows(run: RunFacts) -> list[dict[str, Any]]:
    if run.selection is None:
        return []
    return [
        {"score": score, "importance": importance, "chosen": score.layer in run.selection.attention_layers}
        for score, importance in zip(run.selection.sweep.layers, run.selection.importance, strict=True)
    ]


def _needles(run: RunFacts) -> dict[str, Any] | None:
    evaluations = [evaluation for evaluation in run.evaluations.values() if evaluation.niah]
    if not evaluations:
        return None
    tasks = list(dict.fromkeys(cell.task for evaluation in evaluations for cell in evaluation.niah))
    return {
        "by_context": plots.niah_by_context(run),
        "maps": [(evaluation, plots.niah_heat_map(evaluation)) for evaluation in evaluations],
        "by_task": [
            (task, [(evaluation, plots.niah_heat_map(evaluation, task)) for evaluation in evaluations])
            for task in tasks
            if len(tasks) > 1
        ],
        "largest_cell": max(cell.items for evaluation in evaluations for cell in evaluation.niah),
        "tasks": tasks,
    }


def _versions() -> list[tuple[str, str]]:
    """Versions in this process. With `halo run` the same installation ran the stages."""
    versions = [("python", platform.python_version())]
    for package in _VERSIONED_PACKAGES:
        try:
            versions.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return [*versions, ("machine", f"{platform.system()} {platform.machine()}")]
