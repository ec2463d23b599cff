"""Span copies: a span of tokens occurs two or three times within prose, so its repetitions can be recalled."""

from __future__ import annotations

from random import Random

from halo_evaluation.recall.materials import Materials, Segment

_MIN_SPAN, _MAX_SPAN = 12, 128
# A repetition is recognisable only after its first tokens, so these do not count as answers.
_CUE_TOKENS = 2


def span_copy_episode(materials: Materials, rng: Random, length: int) -> list[Segment]:
    """Segments of exactly `length` >= 12 tokens."""
    longest = min(_MAX_SPAN, length // 4)
    size = rng.randint(min(_MIN_SPAN, longest), longest)
    occurrences = 2 if rng.random() < 0.7 else 3
    span = materials.random_tokens(rng, size) if rng.random() < 0.7 else materials.prose(rng, size)
    prose = materials.prose(rng, length - size * occurrences)
    segments, last = [], 0
    for occurrence, cut in enumerate(sorted(rng.randint(0, len(prose)) for _ in range(occurrences))):
        cue = size if occurrence == 0 else _CUE_TOKENS
        segments += [Segment(prose[last:cut]), Segment(span[:cue]), Segment(span[cue:], is_answer=True)]
        last = cut
    return [*segments, Segment(prose[last:])]
