"""calibrate and evaluate: choose the logits scaling of a finished hybrid, and score a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from durable_files import read_json, write_json
from halo_cluster import StageResult
from halo_cluster.fan_out import Task
from halo_cluster.fan_out.plan import WorkerFunction
from halo_evaluation.megatron_scorer import score_batch
from halo_evaluation.ngram import NGramBaseline
from halo_evaluation.niah import VARIANTS
from halo_evaluation.results import Evaluation, NeedleCell
from halo_evaluation.runner import TaskMetrics, evaluate, needle_cells
from halo_evaluation.suites import HeldOut, task_suite
from halo_evaluation.tasks import EvaluationTask
from halo_jobs.plan import TEACHER
from halo_jobs.recipe import PretrainRecipe, Recipe
from halo_jobs.stages.context import HELD_OUT_STORE, TRAIN_STORE, StageContext
from halo_jobs.stages.fan_out import run_tasks, worker_context
from halo_jobs.stages.select import TOKENS_PER_BATCH, held_out_material
from halo_jobs.stages.training import HYBRID_WEIGHTS, TEACHER_WEIGHTS
from halo_training.models import single_part
from hypenet_kernels import chunked_cross_entropy
from hypenet_megatron.model import DecoderModel
from tokenized_data import WindowSampler

NGRAM_TOKENS = 40_000_000


@torch.no_grad()
def _mean_loss(model: DecoderModel, windows: list[torch.Tensor]) -> float:
    """Mean next-token loss in nats per token over windows [context_length + 1]."""
    model.eval()
    losses = []
    for window in windows:
        hidden = model(window[None, :-1]).flatten(0, 1)
        share = torch.full((hidden.shape[0],), 1.0 / hidden.shape[0], device=hidden.device)
        losses.append(float(chunked_cross_entropy(hidden, model.head_weight(), window[1:], share)))
    return float(np.mean(losses))


def run_calibrate(context: StageContext) -> StageResult:
    """Choose `a` by the loss on long held-out windows. The loss without scaling is recorded for comparison."""
    section = context.conversion.calibrate
    sampler = WindowSampler(context.store(HELD_OUT_STORE), section.context_length, context.recipe.seed)
    count = min(section.windows, sampler.num_windows)
    windows = [torch.from_numpy(sampler.window(n).tokens).to(context.device) for n in range(count)]
    weights = context.before("finetune", context.variant) / HYBRID_WEIGHTS
    load = partial(context.builder().hybrid, weights, context.attention_layers)
    candidates = [
        {"base": base, "loss": _mean_loss(single_part(load(base)), windows)}
        for base in track([None, *section.candidates], context.name, console=context.console)
    ]
    best = min((c for c in candidates if c["base"] is not None), key=lambda c: (c["loss"], c["base"]))
    write_json(context.folder / "calibration.json", {"base": best["base"], "candidates": candidates})
    return StageResult([context.folder / "calibration.json"], {"base": best["base"], "loss": best["loss"]})


def logits_scaling_base_of(calibration: Path) -> float:
    return float(read_json(calibration / "calibration.json")["base"])


def _model_under_test(context: StageContext) -> DecoderModel:
    variant = context.variant
    builder = context.builder()
    if variant == TEACHER:
        return single_part(builder.teacher(context.teacher_folder() / TEACHER_WEIGHTS))
    hybrid = builder.hybrid(
        context.before("finetune", variant) / HYBRID_WEIGHTS,
        context.attention_layers,
        logits_scaling_base_of(context.before("calibrate", variant)),
    )
    return single_part(hybrid)


def _training_context(recipe: Recipe) -> int:
    return recipe.training_sections[recipe.evaluated_at].context_length


def _suite(context: StageContext, held_out: HeldOut) -> list[EvaluationTask]:
    """The task suite at the training context."""
    recipe = context.recipe
    return task_suite(held_out, "evaluation", _training_context(recipe), recipe.evaluate.suite_items, recipe.seed)


def make_evaluation_worker(setup: Any) -> WorkerFunction:
    """A worker that loads the model under test once for all of its tasks.

    A fan-out task is one task of the suite, or the needles of one context length and depth.
    """
    context = worker_context(setup)
    scorer = partial(score_batch, _model_under_test(context), context.device)
    tokens_per_batch = TOKENS_PER_BATCH[context.device.type]
    held_out = held_out_material(context)
    suite = {task.name: task for task in _suite(context, held_out)}

    def run(arguments: dict[str, Any]) -> Any:
        if "task" in arguments:
            task = suite[arguments["task"]]
            return {"group": task.group, **evaluate([task], scorer, tokens_per_batch)[task.name]}
        return needle_cells(
            held_out.materials,
            scorer,
            **arguments,
            items=context.recipe.evaluate.needle_items,
            seed=context.recipe.seed,
            tokens_per_batch=tokens_per_batch,
        )

    return run


def _measure(context: StageContext) -> tuple[TaskMetrics, tuple[NeedleCell, ...]]:
    """Metrics of the suite, and cells of the needle grid. Results are kept in files, so a killed stage resumes."""
    section = context.recipe.evaluate
    own_suite = _suite(context, held_out_material(context))
    suite = {task.name: Task(task.name, {"task": task.name}) for task in own_suite}
    needles = {
        (length, depth): Task(f"needles.{length}.{depth}", {"context_length": length, "depth": depth})
        for length in section.contexts
        for depth in section.depths
    }
    longest_first = sorted(needles.values(), key=lambda task: -task.arguments["context_length"])
    found = run_tasks(
        context,
        context.folder / "tasks",
        "halo_jobs.stages.measure:make_evaluation_worker",
        [*longest_first, *suite.values()],
    )
    # The result of a needle task has one cell per variant.
    cells = tuple(
        NeedleCell(**found[needles[length, depth].name][variant])
        for length in section.contexts
        for variant in range(len(VARIANTS))
        for depth in section.depths
    )
    return {name: found[task.name] for name, task in suite.items()}, cells


def run_evaluate(context: StageContext) -> StageResult:
    """Evaluate one model on local proxy tasks: needle grid, key-value recall, last word, next sentence, perplexity."""
    tasks, grid = _measure(context)
    perplexity = next((m["perplexity"] for m in tasks.values() if "perplexity" in m), None)
    result = Evaluation(
        model=context.variant,
        training_context=_training_context(context.recipe),
        tasks=tasks,
        niah=grid,
        perplexity=perplexity,
        ngram_perplexity=_ngram_perplexity(context) if isinstance(context.recipe, PretrainRecipe) else None,
    )
    summary = {"needles": float(np.mean([cell.score for cell in grid])), "perplexity": perplexity}
    return StageResult([result.write(context.folder)], summary)


def _ngram_perplexity(context: StageContext) -> float:
    """Held-out perplexity of a trigram model of the training text, as a baseline."""
    train, held_out = context.store(TRAIN_STORE), context.store(HELD_OUT_STORE)
    tokens = train.read(0, min(train.num_tokens, NGRAM_TOKENS))
    baseline = NGramBaseline.fit(tokens, order=3, vocab_size=train.tokenizer.vocab_size)
    return baseline.perplexity(held_out.read(0, min(held_out.num_tokens, NGRAM_TOKENS)))
