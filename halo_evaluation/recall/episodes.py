"""Recall episodes: each a fixed number of tokens that ends with EOS, and a pure function of (seed, index)."""

from __future__ import annotations

from random import Random

import numpy as np

from halo_evaluation.recall.key_values import key_value_episode
from halo_evaluation.recall.materials import Materials, Segment, join, segment
from halo_evaluation.recall.needles import needle_episode
from halo_evaluation.recall.span_copies import span_copy_episode

SHORTEST_CONTEXT = 64
_SHORTEST_PART = 64


def check_episode_settings(context_length: int, answer_weight: int) -> None:
    """ValueError when no episodes can be made with these."""
    if context_length < SHORTEST_CONTEXT:
        raise ValueError(
            f"recall episodes need a context_length of at least {SHORTEST_CONTEXT}, not {context_length}; lengthen it"
        )
    if not 1 <= answer_weight <= 255:
        raise ValueError(f"answer_weight {answer_weight} does not fit a loss weight; choose 1 to 255")


class EpisodeGenerator:
    """Makes episode n of a seed without making those before it, so that any number of processes share the work."""

    def __init__(self, materials: Materials, context_length: int, seed: int, answer_weight: int = 4):
        """`answer_weight` in [1, 255] is the loss weight of answer tokens; all others have 1."""
        check_episode_settings(context_length, answer_weight)
        self.context_length = context_length
        self._materials = materials
        self._eos = segment([materials.eos_id])
        self._seed = seed
        self._answer_weight = answer_weight

    def episode(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [context_length] and loss weights uint8 [context_length] of episode `index` >= 0."""
        rng = Random(f"{self._seed}/{index}")
        segments: list[Segment] = []
        for length in self._part_lengths(rng):
            segments += [*self._part(rng, length - 1), self._eos]
        ids, is_answer = join(segments)
        assert len(ids) == self.context_length
        return ids, np.where(is_answer, self._answer_weight, 1).astype(np.uint8)

    def _part_lengths(self, rng: Random) -> list[int]:
        """One part of full length, two halves or four quarters; short contexts are not divided further."""
        share = rng.random()
        parts = 1 if share < 0.6 else 2 if share < 0.85 else 4
        while parts > 1 and self.context_length // parts < _SHORTEST_PART:
            parts //= 2
        size = self.context_length // parts
        return [size] * (parts - 1) + [self.context_length - size * (parts - 1)]

    def _part(self, rng: Random, length: int) -> list[Segment]:
        """Segments of exactly `length` tokens: a needle episode, a key-value list or a span copy."""
        share = rng.random()
        made = None
        if share < 0.55:
            made = needle_episode(self._materials, rng, length)
        elif share < 0.80:
            made = key_value_episode(self._materials, rng, length)
        return span_copy_episode(self._materials, rng, length) if made is None else made
