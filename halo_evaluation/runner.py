"""Runs evaluation tasks through a scorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from halo_evaluation.interface import ScoreBatch, Scorer, TokenScores
from halo_evaluation.niah import VARIANTS, needle_task
from halo_evaluation.recall.materials import Materials
from halo_evaluation.tasks import EvaluationTask

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


def needle_cells(
    materials: Materials,
    scorer: Scorer,
    context_length: int,
    depth: float,
    items: int,
    seed: int,
    tokens_per_batch: int,
) -> list[dict[str, Any]]:
    """The fields of a NeedleCell for every variant of the needle task at one context length and depth."""
    tasks = [needle_task(materials, variant, context_length, [depth], items, seed) for variant in VARIANTS]
    cell = {"context_length": context_length, "depth": depth, "items": items}
    metrics = evaluate(tasks, scorer, tokens_per_batch)
    return [{"task": task, "score": numbers["score"], **cell} for task, numbers in metrics.items()]
