"""select: sweep over M(i), importance of every layer, and the layers that stay attention."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch

from durable_files import read_json, write_json
from halo_jobs.evaluation.runner import TaskMetrics, evaluate_models
from halo_jobs.evaluation.suites import HeldOut, group_score, group_standard_error, selection_suite
from halo_jobs.models import whole
from halo_jobs.recall import load_words
from halo_jobs.selection.scores import (
    LayerScore,
    LayerSweep,
    all_choices,
    choose_attention_layers,
    layer_importance,
)
from halo_jobs.selection.sweep import LayerSwitch
from halo_jobs.stages.context import HELD_OUT_STORE, StageContext, StageResult
from halo_jobs.stages.data import WORDS_FILE, tokenizer_folder
from halo_jobs.stages.training import STUDENT_WEIGHTS, TEACHER_WEIGHTS
from halo_jobs.training.progress import ProgressReporter
from tokenized_data import WindowSampler

TOKENS_PER_BATCH = {"cpu": 8192, "cuda": 2**17}
DIVERGENCE_WINDOWS = 8


def held_out_material(context: StageContext) -> HeldOut:
    """Documents and key words that no training stage sees."""
    return HeldOut.of(context.store(HELD_OUT_STORE), tokenizer_folder(context.recipe), load_words(WORDS_FILE))


def _divergence(context: StageContext, switch: LayerSwitch, context_length: int) -> list[float]:
    """KL(teacher || M(i)) on held-out prose."""
    sampler = WindowSampler(context.store(HELD_OUT_STORE), context_length, context.recipe.seed)
    count = min(DIVERGENCE_WINDOWS, sampler.num_windows)
    windows = [sampler.window(sample).tokens[:-1] for sample in range(count)]
    return switch.divergence(torch.from_numpy(np.stack(windows)).to(context.device))


def _measure(
    context: StageContext, switch: LayerSwitch, num_layers: int
) -> tuple[LayerSweep, list[TaskMetrics]]:
    """All scores; each task's are kept in a file, so that a killed sweep goes on with the next task."""
    section = context.conversion.select
    tasks = selection_suite(
        held_out_material(context),
        context_length=section.context_length,
        items=section.items,
        seed=context.recipe.seed,
    )
    per_model: list[TaskMetrics] = [{} for _ in range(num_layers + 1)]
    reporter = ProgressReporter(context.name, len(tasks), context.console, context.folder)
    with reporter.live():
        for done, task in enumerate(tasks, start=1):
            kept = context.folder / "sweep" / f"{task.name}.json"
            if not kept.exists():
                metrics = evaluate_models([task], switch.score, TOKENS_PER_BATCH[context.device.type])
                write_json(kept, [model[task.name] for model in metrics])
            for model, numbers in zip(per_model, read_json(kept), strict=True):
                model[task.name] = numbers
            reporter.update(done, f"{task.name}: teacher {per_model[0][task.name]['score']:.2f}")
    recall, commonsense = (
        [group_score(tasks, metrics, group) for metrics in per_model] for group in ("recall", "commonsense")
    )
    divergence = _divergence(context, switch, section.context_length)
    layers = tuple(
        LayerScore(layer, recall[layer + 1], commonsense[layer + 1], divergence[layer])
        for layer in range(num_layers)
    )
    error = group_standard_error(tasks, per_model[0], "commonsense")
    return LayerSweep(layers, recall[0], commonsense[0], error), per_model


def run_select(context: StageContext) -> StageResult:
    section = context.conversion.select
    builder = context.builder()
    aligned = builder.aligned(
        context.inputs["init"] / TEACHER_WEIGHTS, context.inputs["align"] / STUDENT_WEIGHTS
    )
    switch = LayerSwitch(whole(aligned), context.device)
    sweep, per_model = _measure(context, switch, builder.shape.num_layers)
    importance = layer_importance(section.method, sweep)
    if section.attention_layers is not None:
        builder.shape.hybrid_mixers(section.attention_layers)  # refuses layers that do not exist
        chosen = tuple(sorted(section.attention_layers))
    else:
        chosen = choose_attention_layers(section.method, sweep)
    selection = {
        "method": "given" if section.attention_layers is not None else section.method,
        "attention_layers": list(chosen),
        "layers": [
            {**asdict(score), "importance": importance[score.layer] if importance else None}
            for score in sweep.layers
        ],
        "teacher": {"recall": sweep.teacher_recall, "commonsense": sweep.teacher_commonsense},
        "commonsense_error": sweep.commonsense_error,
        "choices": {method: list(layers) for method, layers in all_choices(sweep).items()},
        "tasks": {"teacher": per_model[0], "replaced": per_model[1:]},
    }
    write_json(context.folder / "selection.json", selection)
    return StageResult([context.folder / "selection.json"], {"attention_layers": list(chosen)})
