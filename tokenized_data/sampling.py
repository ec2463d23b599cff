"""Which tokens sample n of a training run is made of. The samplers have no state: (seed, n) is everything.

So resuming is asking for the next n, and the order does not depend on how many processes share the work. Orders come
from integer arithmetic alone: numpy does not promise that a Generator draws the same in its next release.
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
    """Windows of one store, `context_length` tokens apart, each exactly once per epoch, in a new order every epoch.

    With `tokens`, only windows among the first so many tokens of the store.
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
        """Window of sample `sample` >= 0; epoch `sample // num_windows` has an order of its own."""
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
            f"proportions {list(proportions)} must be positive or 0 and sum to 1; round them to four decimals that do"
        )
    return period, [int(share * period) for share in shares]


def _schedule(period: int, draws: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Source of each sample of a period, and how many samples before it came from that source; int32 [period] each.

    A source may give its k-th sample from when it is no more than one sample ahead, and must have given it before it
    is one behind; the most urgent one goes first. With shares that sum to 1 all can always be served in time, which is
    why a running count never strays a whole sample from its proportion (largest deficit alone would let it).
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
    """Several samplers in fixed proportions: after any n samples each has given its share to within one.

    The order of the sources repeats after as many samples as the proportions need to come out whole (20 for 0.65 and
    0.35), so which source sample n comes from, and which of its windows, is a look-up and arithmetic on n.
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
