"""The standard lists of tasks, built from held-out text, a tokenizer and held-out words. All are local proxies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenized_data import TokenStore

from halo_jobs.evaluation.interface import Group, Task
from halo_jobs.evaluation.key_values import key_value_task
from halo_jobs.evaluation.last_word import last_word_task
from halo_jobs.evaluation.next_sentence import next_sentence_task
from halo_jobs.evaluation.niah import VARIANTS, needle_task
from halo_jobs.evaluation.passages import DocumentSource
from halo_jobs.evaluation.perplexity import perplexity_task
from halo_jobs.recall.materials import Materials
from halo_jobs.recall.words import WordSplit

_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_MOST_PAIRS = 32
_TOKENS_PER_PAIR = 16  # a word, punctuation and four digits, with room to spare


@dataclass(frozen=True)
class HeldOut:
    """What no model was trained on: documents, and the words of `materials`."""

    documents: DocumentSource
    materials: Materials

    @classmethod
    def of(cls, store: TokenStore, tokenizer_folder: Path, words: WordSplit) -> HeldOut:
        materials = Materials(
            store, tokenizer_folder / "tokenizer.json", store.tokenizer.eos_id, words.held_out
        )
        return cls(store, materials)


def _suite(held_out: HeldOut, context_length: int, items: int, seed: str) -> list[Task]:
    pairs = max(2, min(_MOST_PAIRS, (context_length - 64) // _TOKENS_PER_PAIR))
    materials = held_out.materials
    return [
        *(needle_task(materials, variant, context_length, _DEPTHS, items, seed) for variant in VARIANTS),
        key_value_task(materials, pairs, context_length, items, seed),
        next_sentence_task(held_out.documents, materials, items, seed),
        last_word_task(held_out.documents, materials, items, seed),
    ]


def selection_suite(held_out: HeldOut, *, context_length: int, items: int, seed: int) -> list[Task]:
    """What layers are chosen by; `items` per task. Its items are not those of the evaluation suite."""
    return _suite(held_out, context_length, items, f"selection/{seed}")


def evaluation_suite(held_out: HeldOut, *, context_length: int, items: int, seed: int) -> list[Task]:
    """What a finished model is judged by, `items` per task, perplexity included."""
    return [
        *_suite(held_out, context_length, items, f"evaluation/{seed}"),
        perplexity_task(held_out.documents, context_length, items),
    ]


def group_score(tasks: Sequence[Task], metrics: Mapping[str, Mapping[str, float]], group: Group) -> float:
    """Mean "score" of the tasks of one group: R for "recall", C for "commonsense", both in [0, 1]."""
    return float(np.mean([metrics[task.name]["score"] for task in tasks if task.group == group]))
