"""The n-gram baseline."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from halo_evaluation import ngram
from halo_evaluation.ngram import NGramBaseline


def reference_log_probability(train: list[int], text: list[int], order: int, vocab_size: int) -> list[float]:
    """Interpolated Kneser-Ney with dictionaries, as the formula reads."""
    levels: list[Counter[tuple[int, ...]]] = []
    grams = Counter(tuple(train[at : at + order]) for at in range(len(train) - order + 1))
    for _ in range(order):
        levels.insert(0, grams)
        grams = Counter(gram[1:] for gram in grams)

    def probability(gram: tuple[int, ...]) -> float:
        if not gram:
            return 1 / vocab_size
        counts = levels[len(gram) - 1]
        followers = {key: count for key, count in counts.items() if key[:-1] == gram[:-1]}
        if not followers:
            return probability(gram[1:])
        ones, twos = (sum(count == wanted for count in counts.values()) for wanted in (1, 2))
        discount = (ones + 1) / (ones + 2 * twos + 5)
        rest = discount * len(followers) * probability(gram[1:])
        return (max(counts[gram] - discount, 0) + rest) / sum(followers.values())

    return [float(np.log(probability(tuple(text[at : at + order])))) for at in range(len(text) - order + 1)]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_matches_the_formula(order: int) -> None:
    generator = np.random.default_rng(0)
    train = np.minimum(generator.geometric(0.2, 400), 13).astype(np.uint16)
    text = generator.integers(0, 16, 60)
    model = NGramBaseline.fit(train, order, vocab_size=16)
    expected = reference_log_probability(train.tolist(), text.tolist(), order, 16)
    np.testing.assert_allclose(model.log_probabilities(text), expected, rtol=1e-12)
    assert model.perplexity(text) == pytest.approx(np.exp(-np.mean(expected)), rel=1e-12)


def test_ngram_probabilities_sum_to_one() -> None:
    generator = np.random.default_rng(1)
    model = NGramBaseline.fit(generator.integers(0, 9, 500), vocab_size=11)
    for context in ([1, 2], [3, 10], [10, 10]):  # seen, half seen, unseen
        total = sum(np.exp(model.log_probabilities(np.array([*context, token]))[0]) for token in range(11))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_ngram_perplexity_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    model = NGramBaseline.fit(generator.integers(0, 40, 3000), vocab_size=40)
    text = generator.integers(0, 40, 1000)
    whole = model.perplexity(text)
    monkeypatch.setattr(ngram, "_POSITIONS_PER_CHUNK", 77)
    assert model.perplexity(text) == pytest.approx(whole, rel=1e-12)


def test_ngram_learns_a_pattern_at_a_large_vocabulary() -> None:
    pattern = np.tile(np.array([5, 151_000, 7, 5, 9, 151_935], dtype=np.uint32), 200)
    model = NGramBaseline.fit(pattern, vocab_size=151_936)
    assert model.perplexity(pattern) < 1.1


@pytest.mark.parametrize(
    ("tokens", "order", "vocab_size", "match"),
    [
        ([1, 2, 3], 4, 151_936, "64 bits"),
        ([1, 2], 3, 10, "too few"),
        ([1, 2, 10], 3, 10, "vocab_size is 10"),
        ([1, -2, 3], 3, 10, "vocab_size is 10"),
    ],
)
def test_ngram_refuses(tokens: list[int], order: int, vocab_size: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NGramBaseline.fit(np.array(tokens), order, vocab_size=vocab_size)
