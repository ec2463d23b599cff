"""Key-value recall: a list of pairs within held-out prose, and a question for one value at the end. A local proxy."""

from __future__ import annotations

from random import Random

from halo_evaluation.recall.key_values import CANONICAL, CANONICAL_DIGITS, around, digits
from halo_evaluation.recall.materials import Materials, total_length
from halo_evaluation.rows import TokenRow
from halo_evaluation.tasks import AnswerTask

NAME = "local_key_value"


def _row(materials: Materials, rng: Random, pairs: int, context_length: int) -> TokenRow:
    drawn = [(key, digits(rng, CANONICAL_DIGITS)) for key in rng.sample(materials.words, pairs)]
    body = CANONICAL.pairs(materials, drawn)
    question = CANONICAL.ask(materials, *rng.choice(drawn))
    needed = len(body) + total_length(question)
    if needed > context_length:
        raise ValueError(
            f"{NAME}: {pairs} pairs take {needed} tokens, but context_length is {context_length}; increase it"
        )
    return TokenRow.of(around(materials, rng, body, question, context_length))


def key_value_task(
    materials: Materials, pairs: int, context_length: int, items: int, seed: int | str
) -> AnswerTask:
    """`items` lists of `pairs` distinct keys (held-out words) with 4-digit values, `context_length` tokens each.

    ValueError if there are too few words, or if the pairs do not fit.
    """
    if pairs > len(materials.words):
        raise ValueError(f"{NAME}: {pairs} pairs need as many words, but the list has {len(materials.words)}")
    rows = [
        _row(materials, Random(f"{seed}/key_value/{pairs}/{context_length}/{index}"), pairs, context_length)
        for index in range(items)
    ]
    return AnswerTask(NAME, "recall", rows)
