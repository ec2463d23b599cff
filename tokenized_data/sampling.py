"""Which tokens sample n of a training run is made of. The samplers have no state: (seed, n) is everything.

So resuming is asking for the next n, and the order does not depend on how many processes share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokenized_data.store import TokenStore

_MASK = 2**64 - 1
_ROUNDS = 6


@dataclass(frozen=True)
class Window:
    """tokens int64 [context_length + 1]; loss_weights fp32 [context_length], those of the labels tokens[1:]."""

    tokens: np.ndarray
    loss_weights: np.ndarray
    source: str
    position: int


def _mix(value: int) -> int:
    """SplitMix64's finaliser: 64 well-mixed bits, the same on every machine and in every numpy."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permuted(index: int, size: int, key: int) -> int:
    """Image of `index` under a permutation of range(size) chosen by `key`; O(1) memory.

    A Feistel network permutes the next power of four; values outside the range are walked on until they fall in.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (_mix(key ^ _mix(right * _ROUNDS + round_number)) & half_mask)
        index = left << half_bits | right
        if index < size:
            return index


class WindowSampler:
    """Windows of one store, `context_length` tokens apart, each exactly once per epoch, in a new order every epoch."""

    def __init__(self, store: TokenStore, context_length: int, seed: int) -> None:
        self._store = store
        self._context_length = context_length
        self._seed = seed
        self.num_windows = (store.num_tokens - 1) // context_length
        if self.num_windows < 1:
            raise ValueError(
                f"{store.folder} has {store.num_tokens:,} tokens, too few for one window of context_length "
                f"{context_length}; add text or shorten the context"
            )

    def window(self, sample: int) -> Window:
        epoch, index = divmod(sample, self.num_windows)
        start = permuted(index, self.num_windows, _mix(_mix(self._seed) ^ epoch)) * self._context_length
        return Window(
            tokens=self._store.read(start, self._context_length + 1).astype(np.int64),
            loss_weights=self._store.read_loss_weights(start + 1, self._context_length).astype(np.float32),
            source=self._store.folder.name,
            position=start,
        )


class BlendedSampler:
    """Several samplers in fixed proportions: after any n samples each has given its share to within one.

    Sources are nested pairwise, so that which one sample n comes from, and which of its windows, is arithmetic on n.
    """

    def __init__(self, samplers: Sequence[WindowSampler], proportions: Sequence[float]) -> None:
        if len(samplers) != len(proportions) or abs(sum(proportions) - 1.0) > 1e-9 or min(proportions) < 0:
            raise ValueError(
                f"proportions {list(proportions)} must be one per source, not negative, and sum to 1"
            )
        self._samplers = list(samplers)
        self._proportions = list(proportions)

    def window(self, sample: int) -> Window:
        rest = 1.0
        for sampler, proportion in zip(self._samplers[:-1], self._proportions[:-1], strict=True):
            share = proportion / rest if rest > 0 else 0.0
            before = int(sample * share)
            if int((sample + 1) * share) > before:
                return sampler.window(before)
            sample -= before
            rest -= proportion
        return self._samplers[-1].window(sample)
