"""An interpolated Kneser-Ney n-gram model over token ids, as a baseline for perplexities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_POSITIONS_PER_CHUNK = 1 << 20  # bounds the memory of perplexity()


@dataclass(frozen=True)
class _Level:
    """Counts of the n-grams of one length. An n-gram is a uint64 with the latest token in the lowest bits.

    The highest level counts occurrences, lower levels the distinct tokens that precede an n-gram (Kneser-Ney).
    """

    keys: Array  # uint64 [n-grams], sorted
    counts: Array  # int64 [n-grams]
    contexts: Array  # uint64 [contexts], sorted; keys without the latest token
    totals: Array  # int64 [contexts], sum of the counts of the n-grams of a context
    types: Array  # int64 [contexts], number of n-grams of a context
    discount: float

    @classmethod
    def count(cls, grams: Array, bits: int) -> _Level:
        keys, counts = np.unique(grams, return_counts=True)
        contexts, types = np.unique(keys >> np.uint64(bits), return_counts=True)
        totals = np.add.reduceat(counts, np.cumsum(types) - types)
        once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
        # n1 / (n1 + 2 n2), with pseudocounts of one n-gram that occurs once and two that occur twice. A text without
        # such n-grams then still reserves probability for unseen tokens.
        return cls(keys, counts, contexts, totals, types, (once + 1) / (once + 2 * twice + 5))

    def interpolate(self, grams: Array, bits: int, lower: Array) -> Array:
        """p(latest token | tokens before it), float64. `lower` is the same from the level below."""
        gram_at, gram_found = _find(self.keys, grams)
        context_at, context_found = _find(self.contexts, grams >> np.uint64(bits))
        counts = np.where(gram_found, self.counts[gram_at], 0)
        totals = self.totals[context_at]
        kept = np.maximum(counts - self.discount, 0.0)
        mixed = (kept + self.discount * self.types[context_at] * lower) / totals
        return np.where(context_found, mixed, lower)


def _find(table: Array, wanted: Array) -> tuple[Array, Array]:
    at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return at, table[at] == wanted


def _pack(tokens: Array, order: int, bits: int) -> Array:
    """All n-grams of `order` tokens: uint64 [tokens - order + 1]."""
    grams = np.zeros(len(tokens) - order + 1, dtype=np.uint64)
    for offset in range(order):
        grams <<= np.uint64(bits)
        grams |= tokens[offset : offset + len(grams)].astype(np.uint64)
    return grams


@dataclass(frozen=True)
class NGramBaseline:
    """p(token | order - 1 tokens before it): Kneser-Ney with one discount per level, above a uniform distribution."""

    order: int
    vocab_size: int
    levels: tuple[_Level, ...]  # n-grams of 1, 2, ... order tokens

    @classmethod
    def fit(cls, tokens: Array, order: int = 3, *, vocab_size: int) -> NGramBaseline:
        """Count token ids [tokens] of any integer dtype. Peak memory is about 60 bytes per token.

        Raises ValueError if an n-gram does not fit 64 bits, if ids exceed `vocab_size`, or if tokens are too few.
        """
        bits = max((vocab_size - 1).bit_length(), 1)
        if order < 1 or order * bits > 64:
            raise ValueError(f"order {order} with {vocab_size} tokens does not fit 64 bits; lower the order")
        _check(tokens, order, vocab_size)
        grams = _pack(tokens, order, bits)
        levels: list[_Level] = []
        for length in range(order, 0, -1):
            levels.insert(0, _Level.count(grams, bits))
            grams = levels[0].keys & np.uint64((1 << bits * (length - 1)) - 1)
        return cls(order, vocab_size, tuple(levels))

    def log_probabilities(self, tokens: Array) -> Array:
        """log p of tokens[order - 1:] in nats, float64."""
        bits = max((self.vocab_size - 1).bit_length(), 1)
        grams = _pack(tokens, self.order, bits)
        probabilities: Array = np.full(len(grams), 1.0 / self.vocab_size)
        for length, level in enumerate(self.levels, start=1):
            shorter = grams & np.uint64((1 << bits * length) - 1)
            probabilities = level.interpolate(shorter, bits, probabilities)
        return np.log(probabilities)

    def perplexity(self, tokens: Array) -> float:
        """exp of the mean negative log probability of tokens[order - 1:]."""
        _check(tokens, self.order, self.vocab_size)
        total = 0.0
        scored = len(tokens) - self.order + 1
        for start in range(0, scored, _POSITIONS_PER_CHUNK):
            chunk = tokens[start : start + _POSITIONS_PER_CHUNK + self.order - 1]
            total += float(self.log_probabilities(chunk).sum())
        return float(np.exp(-total / scored))


def _check(tokens: Array, order: int, vocab_size: int) -> None:
    if len(tokens) < order:
        raise ValueError(f"{len(tokens)} tokens are too few for {order}-grams; give more text")
    if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
        raise ValueError(
            f"token ids range from {tokens.min()} to {tokens.max()}, but vocab_size is {vocab_size}"
        )
