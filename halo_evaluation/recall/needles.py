"""Needles: facts about random keys, stated once within prose and asked for at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np

from halo_evaluation.recall.materials import Materials, Segment, insert, segment, total_length

MAX_NEEDLES = 8
_SHORT_HAYSTACK = 32
_AFTER_SENTENCE_SHARE = 0.8

ValueKind = Literal["number", "hex", "word"]


@dataclass(frozen=True)
class Phrasing:
    """Templates of a statement and a question with {noun} and {key}. The value follows each."""

    statement: str
    question: str


# The wording of evaluation items and of about half of the needle episodes in training.
CANONICAL = Phrasing(
    " The special {noun} for {key} is:",
    "\nWhat is the special {noun} for {key}? The special {noun} for {key} is:",
)
CANONICAL_NOUN = "magic number"
_OTHER_PHRASINGS = (
    Phrasing(
        " One of the special {noun}s for {key} is:",
        "\nWhat is the special {noun} for {key} mentioned in the provided text?"
        " The special {noun} for {key} mentioned in the provided text is",
    ),
    Phrasing(" Remember that the {noun} of {key} is", "\nQuestion: what is the {noun} of {key}?\nAnswer:"),
    Phrasing(" The {noun} for {key}:", "\n\nThe {noun} for {key}:"),
)
_OTHER_NOUNS = ("secret code", "access code", "serial number", "pass key")
_NOUNS: dict[ValueKind, tuple[str, ...]] = {
    "number": (CANONICAL_NOUN,) * len(_OTHER_NOUNS) + _OTHER_NOUNS,
    "hex": (CANONICAL_NOUN, "magic uuid", "magic uuid", "magic uuid") + _OTHER_NOUNS,
    "word": ("magic word",),
}


@dataclass(frozen=True)
class Needle:
    """One fact and its wording."""

    phrasing: Phrasing
    noun: str
    key: str
    value: str

    def statement(self, materials: Materials) -> list[int]:
        statement = self.phrasing.statement.format(noun=self.noun, key=self.key)
        return [*materials.encode(statement), *materials.encode(f" {self.value}"), *materials.encode(".")]

    def question(self, materials: Materials) -> list[Segment]:
        """Question and answer, without a full stop after the answer."""
        question = self.phrasing.question.format(noun=self.noun, key=self.key)
        answer = segment(materials.encode(f" {self.value}"), is_answer=True)
        return [segment(materials.encode(question)), answer]


def number(rng: Random, digits: int = 7) -> str:
    """A decimal number with `digits` digits. The first is not 0."""
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def hex_groups(rng: Random, groups: Sequence[int]) -> str:
    """Lower-case hexadecimal digits in groups of the given sizes, joined by hyphens as in a UUID."""
    return "-".join(f"{rng.getrandbits(4 * size):0{size}x}" for size in groups)


_HEX_SHAPES: tuple[tuple[int, ...], ...] = ((8,), (8, 4), (8, 4, 4), (8, 4, 4, 4, 12))


def _value(rng: Random, kind: ValueKind, words: Sequence[str]) -> str:
    if kind == "hex":
        return hex_groups(rng, rng.choice(_HEX_SHAPES))
    if kind == "word":
        return rng.choice(words)
    return number(rng, 7 if rng.random() < 0.75 else rng.randint(3, 10))


def _keys(rng: Random, words: Sequence[str], count: int) -> list[str]:
    """Distinct keys: single words, or sometimes two words joined by a hyphen."""
    return [
        word if rng.random() < 0.7 else f"{word}-{rng.choice(words)}"
        for word in rng.sample(words, min(count, len(words)))
    ]


def _draw(rng: Random, words: Sequence[str]) -> list[Needle]:
    """One to eight needles in the same wording."""
    share = rng.random()
    count = 1 if share < 0.5 else rng.randint(2, 4) if share < 0.8 else rng.randint(5, MAX_NEEDLES)
    kind: ValueKind = rng.choices(("number", "hex", "word"), (72, 20, 8))[0]
    phrasing = CANONICAL if rng.random() < 0.55 else rng.choice(_OTHER_PHRASINGS)
    noun = rng.choice(_NOUNS[kind])
    return [Needle(phrasing, noun, key, _value(rng, kind, words)) for key in _keys(rng, words, count)]


def _positions(materials: Materials, rng: Random, haystack: np.ndarray, count: int) -> list[int]:
    """Positions of the needles: mostly at the end of a sentence, sometimes within one."""
    ends = materials.sentence_ends(haystack)
    positions = []
    for _ in range(count):
        position = rng.randint(0, len(haystack))
        if len(ends) and rng.random() < _AFTER_SENTENCE_SHARE:
            position = int(ends[min(int(np.searchsorted(ends, position)), len(ends) - 1)])
        positions.append(position)
    return positions


def needle_episode(materials: Materials, rng: Random, length: int) -> list[Segment] | None:
    """Segments of exactly `length` tokens, or None if one needle does not fit."""
    needles = _draw(rng, materials.words)
    asked = rng.sample(needles, min(len(needles), 1 if rng.random() < 0.5 else rng.randint(1, 3)))
    stop = segment(materials.encode("."))
    while True:
        statements = [needle.statement(materials) for needle in needles]
        tail = [piece for needle in asked for piece in (*needle.question(materials), stop)]
        room = length - total_length(tail) - sum(map(len, statements))
        if room >= _SHORT_HAYSTACK or (len(needles) == 1 and room >= 0):
            break
        if len(needles) == 1:
            return None
        needles = asked = asked[:1]
    haystack = materials.prose(rng, room)
    positions = _positions(materials, rng, haystack, len(needles))
    return [*insert(haystack, zip(positions, statements, strict=True)), *tail]
