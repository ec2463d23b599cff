"""Needle in a haystack: one fact at a chosen depth, and a question for it at the end.

A local proxy of NIAH single 1 to 3 of RULER (arXiv 2404.06654), with another haystack, other keys, the wording of the
training episodes, and no instruction at the beginning.
  variant 1  a 7-digit number in a repeated sentence
  variant 2  a 7-digit number in held-out prose
  variant 3  16 hexadecimal digits in groups, in held-out prose (RULER asks for a whole UUID)
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

import numpy as np

from halo_evaluation.recall.materials import Materials, insert, total_length
from halo_evaluation.recall.needles import CANONICAL, CANONICAL_NOUN, Needle, hex_groups, number
from halo_evaluation.rows import TokenRow
from halo_evaluation.tasks import AnswerTask

NeedleVariant = Literal[1, 2, 3]
VARIANTS: tuple[NeedleVariant, ...] = (1, 2, 3)
_NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_LONG_VALUE = (8, 4, 4)  # a shape that training episodes also use
_NEAR_TOKENS, _NEAR_SHARE = 16, 0.05


def needle_task_name(variant: NeedleVariant) -> str:
    return f"niah_single_{variant}"


def _needle(rng: Random, variant: NeedleVariant, words: Sequence[str]) -> Needle:
    key = rng.choice(words)
    if variant == 3:
        return Needle(CANONICAL, "magic uuid", key, hex_groups(rng, _LONG_VALUE))
    return Needle(CANONICAL, CANONICAL_NOUN, key, number(rng))


def _haystack(materials: Materials, rng: Random, variant: NeedleVariant, length: int) -> np.ndarray:
    """int64 [length]"""
    if variant == 1:
        return np.resize(np.array(materials.encode(_NOISE), np.int64), length)
    return materials.prose(rng, length)


def _position(materials: Materials, haystack: np.ndarray, depth: float) -> int:
    """The end of a sentence nearest to `depth` (0 to 1) of the haystack, or that position itself if none is near."""
    wanted = round(depth * len(haystack))
    ends = np.append(0, materials.sentence_ends(haystack))
    nearest = int(ends[np.abs(ends - wanted).argmin()])
    return nearest if abs(nearest - wanted) <= max(_NEAR_TOKENS, _NEAR_SHARE * len(haystack)) else wanted


def needle_row(
    materials: Materials, rng: Random, variant: NeedleVariant, context_length: int, depth: float
) -> TokenRow:
    """Exactly `context_length` tokens that end with the answer; ValueError if the needle does not fit."""
    needle = _needle(rng, variant, materials.words)
    statement = needle.statement(materials)
    question = needle.question(materials)
    room = context_length - len(statement) - total_length(question)
    if room < 0:
        raise ValueError(
            f"{needle_task_name(variant)} needs a context_length of at least {context_length - room} tokens,"
            f" not {context_length}; increase it"
        )
    haystack = _haystack(materials, rng, variant, room)
    position = _position(materials, haystack, depth)
    return TokenRow.of([*insert(haystack, [(position, statement)]), *question])


def needle_task(
    materials: Materials,
    variant: NeedleVariant,
    context_length: int,
    depths: Sequence[float],
    items: int,
    seed: int | str,
) -> AnswerTask:
    """`items` needles. Item i lies at depths[i % len(depths)], where 0 is the start of the context and 1 its end."""
    rows = []
    for index in range(items):
        depth = depths[index % len(depths)]
        rng = Random(f"{seed}/niah/{variant}/{context_length}/{depth}/{index}")
        rows.append(needle_row(materials, rng, variant, context_length, depth))
    return AnswerTask(needle_task_name(variant), "recall", rows)
