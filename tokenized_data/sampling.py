"""Which tokens sample n of a training run consists of. Samplers have no state: (seed, n) determines the sample.

Training therefore resumes by asking for the next n, and the order does not depend on the number of processes. Orders
come from integer arithmetic only, because numpy does not promise equal draws of a Generator across releases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

from tokenized_data.store import TokenStore

_MASK = 2**64 - 1
_ROUNDS = 6
_LONGEST_PERIOD = 100_000


@dataclass(frozen=True)
class Window:
    """One sample: tokens int64 [context_length + 1] and the loss weights fp32 [context_length] of labels tokens[1:].

    `source` is the name of the store, `position` the index of the first token in it.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray
    source: str
    position: int


def _mix(value: int) -> int:
    """Finaliser of SplitMix64: 64 well-mixed bits, the same on every machine."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permuted(index: int, size: int, key: int) -> int:
    """Image of `index` under a permutation of range(size) that `key` selects, in O(1) memory.

    A Feistel network permutes the next power of four. Values outside the range are permuted again until one is inside.
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
    """Disjoint windows of `context_length` tokens of one store, each once per epoch, in a new order every epoch.

    `tokens` restricts the windows to the first so many tokens. Raises ValueError if not even one window fits.
    """

    def __init__(
        self, store: TokenStore, context_length: int, seed: int, *, tokens: int | None = None
    ) -> None:
        self._store = store
        self._context_length = context_length
        self._seed = seed
        available = store.num_tokens if tokens is None else min(tokens, store.num_tokens)
        self.num_windows = (available - 1) // context_length
        if self.num_windows < 1:
            raise ValueError(
                f"{store.folder} has {available:,} tokens, too few for one window of context_length "
                f"{context_length}; add text or shorten the context"
            )

    def window(self, sample: int) -> Window:
        """Window of sample `sample` >= 0, which belongs to epoch `sample // num_windows`."""
        epoch, index = divmod(sample, self.num_windows)
        start = permuted(index, self.num_windows, _mix(_mix(self._seed) ^ epoch)) * self._context_length
        return Window(
            tokens=self._store.read(start, self._context_length + 1).astype(np.int64),
            loss_weights=self._store.read_loss_weights(start + 1, self._context_length).astype(np.float32),
            source=self._store.folder.name,
            position=start,
        )


def _periodic(proportions: Sequence[float]) -> tuple[int, list[int]]:
    """(period, draws of each source per period) such that draws / period are the proportions."""
    shares = [Fraction(proportion).limit_denominator(_LONGEST_PERIOD) for proportion in proportions]
    period = lcm(*(share.denominator for share in shares))
    if sum(shares) != 1 or min(shares) < 0 or period > _LONGEST_PERIOD:
        raise ValueError(
            f"proportions {list(proportions)} must not be negative and must sum to 1; round them to four decimals"
        )
    return period, [int(share * period) for share in shares]


def _schedule(period: int, draws: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Source of each sample of a period, and how many earlier samples have that source; int32 [period] each.

    Sample k of a source may come once the source would be less than one sample ahead, and must come before it is one
    sample behind. Of the sources that may come, the one with the earliest deadline does. Since the shares sum to 1 no
    deadline is missed, so every count stays within one sample of its proportion. (Choosing the source that is furthest
    behind would not guarantee this.)
    """
    sources, before = np.empty(period, np.int32), np.empty(period, np.int32)
    given = [0] * len(draws)
    for slot in range(period):
        ready = [n for n, share in enumerate(draws) if given[n] * period < (slot + 1) * share]
        chosen = min(ready, key=lambda n: -(-(given[n] + 1) * period // draws[n]))
        sources[slot], before[slot] = chosen, given[chosen]
        given[chosen] += 1
    return sources, before


class BlendedSampler:
    """Several samplers in fixed proportions: after n samples every count is within one sample of its proportion.

    The sequence of sources has a period, the least common denominator of the proportions (20 for 0.65 and 0.35). The
    source of sample n, and which of its windows it is, take one table look-up.
    """

    def __init__(self, samplers: Sequence[WindowSampler], proportions: Sequence[float]) -> None:
        if not samplers or len(samplers) != len(proportions):
            raise ValueError(
                f"{len(samplers)} sources have {len(proportions)} proportions; give each source exactly one"
            )
        self._samplers = list(samplers)
        self._period, self._draws = _periodic(proportions)
        self._sources, self._before = _schedule(self._period, self._draws)

    def window(self, sample: int) -> Window:
        """Window of sample `sample` >= 0 of the blended order."""
        periods, slot = divmod(sample, self._period)
        source = int(self._sources[slot])
        return self._samplers[source].window(periods * self._draws[source] + int(self._before[slot]))
