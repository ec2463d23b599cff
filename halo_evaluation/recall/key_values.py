"""Key-value lists: many pairs at once, some of them asked for at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from halo_evaluation.recall.materials import Materials, Segment, segment, total_length

MOST_PAIRS = 64
_FEWEST_PAIRS = 2
_MOST_QUESTIONS = 6


@dataclass(frozen=True)
class Layout:
    """A pair is written before + key + between + " " + value + after; `question` asks up to the value."""

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
        """Question and answer; what follows the answer is left to the caller."""
        question = segment(materials.encode(self.question.format(key=key)))
        return [question, segment(materials.encode(f" {value}"), is_answer=True)]


# Evaluation uses this one; training sees it in about half of its lists.
CANONICAL = Layout("", ":", "\n", "\nWhat is the value for {key}?\n{key}:")
CANONICAL_DIGITS = 4
_OTHER_LAYOUTS = (
    Layout(' "', '":', ",", '\nThe value stored under "{key}" is'),
    Layout(" ", " =", ";", "\nQuestion: {key} = ?\nAnswer:"),
    Layout("", "", "\n", "\n{key}"),
)


def digits(rng: Random, count: int) -> str:
    """That many decimal digits; the first may be 0."""
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
    """`body` in prose, then `tail`: exactly `length` tokens. Half of the time all of the prose comes first."""
    room = length - len(body) - total_length(tail)
    prose = materials.prose(rng, room)
    cut = rng.randint(0, room) if rng.random() < 0.5 else room
    return [Segment(prose[:cut]), segment(body), Segment(prose[cut:]), *tail]


def key_value_episode(materials: Materials, rng: Random, length: int) -> list[Segment] | None:
    """Segments of exactly `length` tokens, or None when not even two pairs fit."""
    layout = CANONICAL if rng.random() < 0.5 else rng.choice(_OTHER_LAYOUTS)
    most = max(_FEWEST_PAIRS, min(MOST_PAIRS, length // 12))
    pairs = _draw_pairs(rng, materials.words, rng.randint(_FEWEST_PAIRS, most))
    questions = rng.randint(1, _MOST_QUESTIONS)
    end = segment(materials.encode("." if layout.after != "\n" else "\n"))
    while True:
        asked = rng.sample(pairs, min(len(pairs), questions))
        body = layout.pairs(materials, pairs)
        tail = [piece for key, value in asked for piece in (*layout.ask(materials, key, value), end)]
        if len(body) + total_length(tail) <= length:
            return around(materials, rng, body, tail, length)
        if len(pairs) <= _FEWEST_PAIRS:
            return None
        pairs, questions = pairs[: max(_FEWEST_PAIRS, len(pairs) * 3 // 4)], max(1, questions // 2)
