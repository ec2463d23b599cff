"""The standard suites of tasks, built from held-out documents and words. All tasks are local proxies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from halo_evaluation.interface import Group
from halo_evaluation.key_values import key_value_task
from halo_evaluation.last_word import last_word_task
from halo_evaluation.next_sentence import next_sentence_task
from halo_evaluation.niah import VARIANTS, needle_task
from halo_evaluation.passages import DocumentSource
from halo_evaluation.perplexity import perplexity_task
from halo_evaluation.recall.materials import Materials
from halo_evaluation.tasks import EvaluationTask

Purpose = Literal["selection", "evaluation"]  # determines the items: no item is used for both
_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_MAX_PAIRS = 32
_TOKENS_PER_PAIR = 16  # upper bound: a word, punctuation and four digits


@dataclass(frozen=True)
class HeldOut:
    """Documents, and words in `materials`, that no model was trained on."""

    documents: DocumentSource
    materials: Materials


def recall_tasks(
    materials: Materials, purpose: Purpose, context_length: int, items: int, seed: int
) -> list[EvaluationTask]:
    """Needles and key-value lists of exactly `context_length` tokens; ValueError if they do not fit."""
    pairs = max(2, min(_MAX_PAIRS, (context_length - 64) // _TOKENS_PER_PAIR))
    own_seed = f"{purpose}/{seed}"
    return [
        *(needle_task(materials, variant, context_length, _DEPTHS, items, own_seed) for variant in VARIANTS),
        key_value_task(materials, pairs, context_length, items, own_seed),
    ]


def task_suite(
    held_out: HeldOut, purpose: Purpose, context_length: int, items: int, seed: int
) -> list[EvaluationTask]:
    """The tasks that layers are selected by, or that a finished model is evaluated on, with `items` items each.

    Perplexity is for evaluation only.
    """
    own_seed = f"{purpose}/{seed}"
    tasks: list[EvaluationTask] = [
        *recall_tasks(held_out.materials, purpose, context_length, items, seed),
        next_sentence_task(held_out.documents, held_out.materials, items, own_seed),
        last_word_task(held_out.documents, held_out.materials, items, own_seed),
    ]
    if purpose == "evaluation":
        tasks.append(perplexity_task(held_out.documents, context_length, items))
    return tasks


def group_score(tasks: Sequence[EvaluationTask], metrics: Mapping[str, Mapping[str, float]], group: Group) -> float:
    """Mean "score" in [0, 1] of the tasks of one group: R for "recall", C for "commonsense"."""
    return float(np.mean([metrics[task.name]["score"] for task in tasks if task.group == group]))


def group_standard_error(
    tasks: Sequence[EvaluationTask], metrics: Mapping[str, Mapping[str, float]], group: Group
) -> float:
    """Standard error of `group_score`, with every item as an independent Bernoulli trial."""
    own = [metrics[task.name] for task in tasks if task.group == group]
    variances = [m["score"] * (1.0 - m["score"]) / m["items"] for m in own]
    return float(np.sqrt(np.sum(variances)) / len(own))
