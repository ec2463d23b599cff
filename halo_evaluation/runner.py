"""Runs evaluation tasks through a scorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from halo_evaluation.interface import EvaluationTask, ScoreBatch, Scorer, TokenScores
from halo_evaluation.niah import VARIANTS, needle_task
from halo_evaluation.recall.materials import Materials

TaskMetrics = dict[str, dict[str, float]]


def evaluate_models(
    tasks: Sequence[EvaluationTask],
    score: Callable[[ScoreBatch], Sequence[TokenScores]],
    tokens_per_batch: int,
) -> list[TaskMetrics]:
    """Metrics by task name, for each of several models that are scored together, as in the layer sweep.

    `score` returns one TokenScores per model, in the same order for every batch.
    """
    results: list[TaskMetrics] = []
    for task in tasks:
        by_batch = [score(batch) for batch in task.batches(tokens_per_batch)]
        metrics = [task.metrics(scores) for scores in zip(*by_batch, strict=True)]
        results = results or [{} for _ in metrics]
        for result, numbers in zip(results, metrics, strict=True):
            result[task.name] = numbers
    return results


def evaluate(tasks: Sequence[EvaluationTask], scorer: Scorer, tokens_per_batch: int) -> TaskMetrics:
    """Metrics of one model by task name."""
    return evaluate_models(tasks, lambda batch: [scorer(batch)], tokens_per_batch)[0]


def niah_grid(
    materials: Materials,
    scorer: Scorer,
    *,
    contexts: Sequence[int],
    depths: Sequence[float],
    items: int,
    seed: int,
    tokens_per_batch: int,
) -> list[dict[str, Any]]:
    """{"task", "context_length", "depth", "score", "items"} for every cell of variants x contexts x depths.

    Cells are built one after another, to keep only one of them in memory.
    """
    cells = [(variant, context, depth) for variant in VARIANTS for context in contexts for depth in depths]
    results = []
    for variant, context, depth in cells:
        task = needle_task(materials, variant, context, [depth], items, seed)
        score = task.metrics([scorer(batch) for batch in task.batches(tokens_per_batch)])["score"]
        results.append(
            {"task": task.name, "context_length": context, "depth": depth, "score": score, "items": items}
        )
    return results
