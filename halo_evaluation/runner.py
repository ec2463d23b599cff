"""Runs tasks through a scorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from halo_evaluation.interface import ScoreBatch, Scorer, Task, TokenScores
from halo_evaluation.niah import VARIANTS, needle_task
from halo_evaluation.recall.materials import Materials

TaskMetrics = dict[str, dict[str, float]]


def evaluate_models(
    tasks: Sequence[Task],
    score: Callable[[ScoreBatch], Sequence[TokenScores]],
    tokens_per_batch: int,
) -> list[TaskMetrics]:
    """Metrics by task name for each of several models that are scored together, as in the layer sweep.

    `score` returns one TokenScores per model for a batch, always as many and in the same order.
    """
    results: list[TaskMetrics] = []
    for task in tasks:
        by_batch = [score(batch) for batch in task.batches(tokens_per_batch)]
        metrics = [task.metrics(scores) for scores in zip(*by_batch, strict=True)]
        results = results or [{} for _ in metrics]
        for result, numbers in zip(results, metrics, strict=True):
            result[task.name] = numbers
    return results


def evaluate(tasks: Sequence[Task], scorer: Scorer, tokens_per_batch: int) -> TaskMetrics:
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
    """One row {"task", "context_length", "depth", "score", "items"} per cell of variants x contexts x depths.

    Cells are built one after another, so that long contexts never lie in memory together.
    """
    cells = [(variant, context, depth) for variant in VARIANTS for context in contexts for depth in depths]
    rows = []
    for variant, context, depth in cells:
        task = needle_task(materials, variant, context, [depth], items, seed)
        score = task.metrics([scorer(batch) for batch in task.batches(tokens_per_batch)])["score"]
        rows.append(
            {"task": task.name, "context_length": context, "depth": depth, "score": score, "items": items}
        )
    return rows
