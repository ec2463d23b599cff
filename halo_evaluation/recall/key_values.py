"""Key-value lists: many pairs, and questions for some of the values at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from halo_evaluation.recall.materials import Materials, Segment, segment, total_length

MAX_PAIRS = 64
_MIN_PAIRS = 2
_MAX_QUESTIONS = 6


@dataclass(frozen=True)
class ListFormat:
    """Text of a pair: before + key + between + " " + value + after. `question` ends where the value follows."""

    before: str
    between: str
    after: str
    question: str

    def pairs(self, materials: Materials, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of the whole list."""
        encode = materials.encode
        between, after = encode(self.between), encode(self.after)
        ids = [*encode("\n\n")]
        for key, value in pairs:
            ids += [*encode(self.before + key), *between, *encode(f" {value}"), *after]
        return ids

    def ask(self, materials: Materials, key: str, value: str) -> list[Segment]:
        """Question and answer, without anything after the answer."""
        question = segment(materials.encode(self.question.format(key=key)))
        return [question, segment(materials.encode(f" {value}"), is_answer=True)]


# The format of evaluation items and of about half of the lists in training.
CANONICAL = ListFormat("", ":", "\n", "\nWhat is the value for {key}?\n{key}:")
CANONICAL_DIGITS = 4
_OTHER_FORMATS = (
    ListFormat(' "', '":', ",", '\nThe value stored under "{key}" is'),
    ListFormat(" ", " =", ";", "\nQuestion: {key} = ?\nAnswer:"),
    ListFormat("", "", "\n", "\n{key}"),
)


def digits(rng: Random, count: int) -> str:
    """`count` decimal digits. The first may be 0."""
    return f"{rng.randrange(10**count):0{count}}"


def _draw_pairs(rng: Random, words: Sequence[str], count: int) -> list[tuple[str, str]]:
    keys = rng.sample(words, min(count, len(words)))
    if rng.random() < 0.75:
        size = rng.choice((2, 3, 4, 4, 5, 7))
        return [(key, digits(rng, size)) for key in keys]
    return [(key, rng.choice(words)) for key in keys]


def around(
    materials: Materials, rng: Random, body: Sequence[int], tail: Sequence[Segment], length: int
) -> list[Segment]:
    """Prose around `body`, then `tail`: exactly `length` tokens. In half of the cases all prose comes before `body`."""
    room = length - len(body) - total_length(tail)
    prose = materials.prose(rng, room)
    cut = rng.randint(0, room) if rng.random() < 0.5 else room
    return [Segment(prose[:cut]), segment(body), Segment(prose[cut:]), *tail]


def key_value_episode(materials: Materials, rng: Random, length: int) -> list[Segment] | None:
    """Segments of exactly `length` tokens, or None if two pairs do not fit."""
    style = CANONICAL if rng.random() < 0.5 else rng.choice(_OTHER_FORMATS)
    most = max(_MIN_PAIRS, min(MAX_PAIRS, length // 12))
    pairs = _draw_pairs(rng, materials.words, rng.randint(_MIN_PAIRS, most))
    questions = rng.randint(1, _MAX_QUESTIONS)
    end = segment(materials.encode("." if style.after != "\n" else "\n"))
    while True:
        asked = rng.sample(pairs, min(len(pairs), questions))
        body = style.pairs(materials, pairs)
        tail = [piece for key, value in asked for piece in (*style.ask(materials, key, value), end)]
        if len(body) + total_length(tail) <= length:
            return around(materials, rng, body, tail, length)
        if len(pairs) <= _MIN_PAIRS:
            return None
        pairs, questions = pairs[: max(_MIN_PAIRS, len(pairs) * 3 // 4)], max(1, questions // 2)
