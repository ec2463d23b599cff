"""Needle in a haystack, after RULER's NIAH single 1 to 3: one fact at a chosen depth, asked for at the end.

A local proxy: our own haystack, keys and wording (the one training episodes also use), no instruction in front.
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
from halo_evaluation.rows import Row
from halo_evaluation.tasks import AnswerTask

NeedleVariant = Literal[1, 2, 3]
VARIANTS: tuple[NeedleVariant, ...] = (1, 2, 3)
_NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_LONG_VALUE = (8, 4, 4)  # one of the shapes that training episodes use
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
    """The sentence end nearest to the share `depth` of the haystack; that very place when none is near."""
    wanted = round(depth * len(haystack))
    ends = np.append(0, materials.sentence_ends(haystack))
    nearest = int(ends[np.abs(ends - wanted).argmin()])
    return nearest if abs(nearest - wanted) <= max(_NEAR_TOKENS, _NEAR_SHARE * len(haystack)) else wanted


def needle_row(
    materials: Materials, rng: Random, variant: NeedleVariant, context_length: int, depth: float
) -> Row:
    """Exactly `context_length` tokens that end with the answer; ValueError when they are too few for the needle."""
    needle = _needle(rng, variant, materials.words)
    statement = needle.statement(materials)
    question = needle.question(materials)
    room = context_length - len(statement) - total_length(question)
    if room < 0:
        raise ValueError(
            f"{needle_task_name(variant)} needs a context_length of at least {context_length - room} tokens,"
            f" not {context_length}; lengthen it"
        )
    haystack = _haystack(materials, rng, variant, room)
    position = _position(materials, haystack, depth)
    return Row.of([*insert(haystack, [(position, statement)]), *question])


def needle_task(
    materials: Materials,
    variant: NeedleVariant,
    context_length: int,
    depths: Sequence[float],
    items: int,
    seed: int | str,
) -> AnswerTask:
    """`items` needles; item i lies at depths[i % len(depths)], 0 being the start of the context and 1 its end."""
    rows = []
    for index in range(items):
        depth = depths[index % len(depths)]
        rng = Random(f"{seed}/niah/{variant}/{context_length}/{depth}/{index}")
        rows.append(needle_row(materials, rng, variant, context_length, depth))
    return AnswerTask(needle_task_name(variant), "recall", rows)
