"""select: scores every layer in a sweep over M(i), and chooses the layers that stay attention."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from durable_files import publish_once, read_json
from halo_cluster import StageResult
from halo_cluster.fan_out import Task
from halo_cluster.fan_out.plan import WorkerFunction
from halo_evaluation.recall import Materials, load_words
from halo_evaluation.results import Selection
from halo_evaluation.runner import TaskMetrics, evaluate_models
from halo_evaluation.selection.scores import (
    LayerScore,
    LayerSweep,
    all_choices,
    choose_attention_layers,
    layer_importance,
)
from halo_evaluation.selection.sweep import LayerSwitch, layer_groups
from halo_evaluation.suites import HeldOut, group_score, group_standard_error, task_suite
from halo_evaluation.tasks import EvaluationTask
from halo_jobs.stages.context import HELD_OUT_STORE, StageContext
from halo_jobs.stages.data import WORDS_FILE
from halo_jobs.stages.fan_out import run_tasks, worker_context
from halo_jobs.stages.training import STUDENT_WEIGHTS, TEACHER_WEIGHTS
from halo_training.models import single_part
from tokenized_data import WindowSampler

TOKENS_PER_BATCH = {"cpu": 8192, "cuda": 2**17}
DIVERGENCE_WINDOWS = 8
TASKS_PER_WORKER = 8


def held_out_material(context: StageContext) -> HeldOut:
    """Documents and keywords that no training stage uses."""
    store, tokenizer = context.store(HELD_OUT_STORE), context.recipe.tokenizer_folder / "tokenizer.json"
    words = load_words(WORDS_FILE).held_out
    return HeldOut(store, Materials(store, tokenizer, store.tokenizer.eos_id, words))


def _suite(context: StageContext) -> list[EvaluationTask]:
    section = context.conversion.select
    held_out = held_out_material(context)
    return task_suite(held_out, "selection", section.context_length, section.items, context.recipe.seed)


def _divergence_windows(context: StageContext) -> torch.Tensor:
    """Windows of held-out prose [windows, context_length] for KL(teacher || M(i))."""
    length = context.conversion.select.context_length
    sampler = WindowSampler(context.store(HELD_OUT_STORE), length, context.recipe.seed)
    count = min(DIVERGENCE_WINDOWS, sampler.num_windows)
    windows = [sampler.window(sample).tokens[:-1] for sample in range(count)]
    return torch.from_numpy(np.stack(windows)).to(context.device)


def make_sweep_worker(setup: Any) -> WorkerFunction:
    """A worker that loads the aligned model once for all of its tasks.

    A fan-out task is one evaluation task, or the divergence (task None), for a group of layers.
    """
    context = worker_context(setup)
    aligned = context.builder().aligned(
        context.before("init") / TEACHER_WEIGHTS, context.before("align") / STUDENT_WEIGHTS
    )
    switch = LayerSwitch(single_part(aligned), context.device)
    suite = {task.name: task for task in _suite(context)}
    windows = _divergence_windows(context)

    def run(arguments: dict[str, Any]) -> Any:
        layers, teacher = range(*arguments["layers"]), arguments["teacher"]
        if arguments["task"] is None:
            return switch.divergence(windows, layers)
        task = suite[arguments["task"]]
        score = partial(switch.score, layers=layers, teacher=teacher)
        metrics = evaluate_models([task], score, TOKENS_PER_BATCH[context.device.type])
        return [model[task.name] for model in metrics]

    return run


def _groups_of_layers(context: StageContext, folder: Path, num_layers: int, evaluations: int) -> list[range]:
    """Divide the layers into groups; each task sweeps one group.

    The first attempt chooses the number of groups for its number of workers and stores it, so that later attempts with
    other workers have the same tasks. A single worker gets all layers in one group, which shares the most computation.
    """
    workers = context.recipe.fan_out.workers
    wanted = 1 if workers == 1 else math.ceil(TASKS_PER_WORKER * workers / evaluations)
    publish_once(folder / "cut.json", {"groups": wanted})
    return layer_groups(num_layers, read_json(folder / "cut.json")["groups"])


def _measure(context: StageContext, num_layers: int) -> tuple[LayerSweep, list[TaskMetrics]]:
    """Measure all scores. Results are kept in files, so a killed sweep resumes with the remaining tasks."""
    suite, folder = _suite(context), context.folder / "sweep"
    groups = _groups_of_layers(context, folder, num_layers, len(suite) + 1)
    of_group = {}
    for name in [*(task.name for task in suite), None]:
        for group in groups:
            arguments = {"task": name, "layers": [group.start, group.stop], "teacher": group.start == 0}
            of_group[name, group] = Task(f"{name or 'divergence'}.{group.start}-{group.stop - 1}", arguments)
    found = run_tasks(context, folder, "halo_jobs.stages.select:make_sweep_worker", list(of_group.values()))
    per_model: list[TaskMetrics] = [{} for _ in range(num_layers + 1)]
    for task in suite:
        # The first group begins with the teacher.
        rows = [row for group in groups for row in found[of_group[task.name, group].name]]
        for model, numbers in zip(per_model, rows, strict=True):
            model[task.name] = numbers
    divergence = [value for group in groups for value in found[of_group[None, group].name]]
    recall, commonsense = (
        [group_score(suite, metrics, group) for metrics in per_model] for group in ("recall", "commonsense")
    )
    layers = tuple(
        LayerScore(layer, recall[layer + 1], commonsense[layer + 1], divergence[layer])
        for layer in range(num_layers)
    )
    error = group_standard_error(suite, per_model[0], "commonsense")
    return LayerSweep(layers, recall[0], commonsense[0], error), per_model


def run_select(context: StageContext) -> StageResult:
    section = context.conversion.select
    sweep, per_model = _measure(context, context.builder().shape.num_layers)
    importance = layer_importance(section.method, sweep)
    if section.attention_layers is not None:
        chosen = tuple(sorted(section.attention_layers))
    else:
        chosen = choose_attention_layers(section.method, sweep)
    selection = Selection(
        method="given" if section.attention_layers is not None else section.method,
        attention_layers=chosen,
        sweep=sweep,
        importance=importance or (None,) * sweep.num_layers,
        choices={str(method): layers for method, layers in all_choices(sweep).items()},
        tasks=tuple(per_model),
    )
    return StageResult([selection.write(context.folder)], {"attention_layers": list(chosen)})
