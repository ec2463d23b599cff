"""Recall episodes. Each is a fixed number of tokens that ends with EOS, and a pure function of (seed, index)."""

from __future__ import annotations

from random import Random

import numpy as np

from halo_evaluation.recall.key_values import key_value_episode
from halo_evaluation.recall.materials import Materials, Segment, join, segment
from halo_evaluation.recall.needles import needle_episode
from halo_evaluation.recall.span_copies import span_copy_episode

MIN_CONTEXT_LENGTH = 64
_MIN_SECTION_LENGTH = 64


def check_episode_settings(context_length: int, answer_weight: int) -> None:
    """ValueError if no episode can have these settings."""
    if context_length < MIN_CONTEXT_LENGTH:
        raise ValueError(
            f"recall episodes need a context_length of at least {MIN_CONTEXT_LENGTH}, not {context_length}; increase it"
        )
    if not 1 <= answer_weight <= 255:
        raise ValueError(f"answer_weight {answer_weight} does not fit a loss weight; choose 1 to 255")


class EpisodeGenerator:
    """Generates episode n of a seed independently of all others, so that any number of processes can share the work."""

    def __init__(self, materials: Materials, context_length: int, seed: int, answer_weight: int = 4):
        """`answer_weight` in [1, 255] is the loss weight of answer tokens. Other tokens have weight 1."""
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
        for length in self._section_lengths(rng):
            segments += [*self._section(rng, length - 1), self._eos]
        ids, is_answer = join(segments)
        assert len(ids) == self.context_length
        return ids, np.where(is_answer, self._answer_weight, 1).astype(np.uint8)

    def _section_lengths(self, rng: Random) -> list[int]:
        """One section, two halves or four quarters of the context, none below _MIN_SECTION_LENGTH."""
        share = rng.random()
        count = 1 if share < 0.6 else 2 if share < 0.85 else 4
        while count > 1 and self.context_length // count < _MIN_SECTION_LENGTH:
            count //= 2
        size = self.context_length // count
        return [size] * (count - 1) + [self.context_length - size * (count - 1)]

    def _section(self, rng: Random, length: int) -> list[Segment]:
        """Segments of exactly `length` tokens: a needle episode, a key-value list or a span copy."""
        share = rng.random()
        made = None
        if share < 0.55:
            made = needle_episode(self._materials, rng, length)
        elif share < 0.80:
            made = key_value_episode(self._materials, rng, length)
        return span_copy_episode(self._materials, rng, length) if made is None else made
