"""The small tokenizer and the n-gram baseline."""

from __future__ import annotations

import json
import lzma
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from durable_files import sha256_file
from examples.teacher_small.bpe import train_bpe
from examples.teacher_small.prose import DOCUMENT_SEPARATOR
from halo_evaluation import ngram
from halo_evaluation.ngram import NGramBaseline
from halo_jobs.recipe import ASSETS

# ---- tokenizer


@pytest.fixture(scope="module")
def training_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt.xz"
    addresses = (ASSETS / "sotu" / "addresses.jsonl").read_text().splitlines()[:4]
    path.write_bytes(
        lzma.compress(DOCUMENT_SEPARATOR.join(json.loads(line)["text"] for line in addresses).encode())
    )
    return path


def test_trained_tokenizer_loads_and_round_trips(tmp_path: Path, training_text: Path) -> None:
    train_bpe([training_text], tmp_path / "tokenizer", 600)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 600 and tokenizer.model_max_length == 4096
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    text = "It's 2024 – café\n\n  key: 9f3a-11<|im_end|>  Fellow-Citizens \U0001f600\t."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert 1 in ids and tokenizer.convert_ids_to_tokens(tokenizer("2024").input_ids) == ["2", "0", "2", "4"]
    assert tokenizer("café").input_ids == tokenizer(unicodedata.normalize("NFD", "café")).input_ids
    train_bpe([training_text], tmp_path / "again", 600)
    assert sha256_file(tmp_path / "again/tokenizer.json") == sha256_file(
        tmp_path / "tokenizer/tokenizer.json"
    )


def test_too_little_text_for_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("hardly any text")
    with pytest.raises(ValueError, match="1000"):
        train_bpe([tmp_path / "t.txt"], tmp_path / "tokenizer", 1000)
    assert not (tmp_path / "tokenizer").exists()


def test_committed_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer-small")
    assert len(tokenizer) == 8192
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    lengths: dict[str, int] = defaultdict(int)
    for line in (ASSETS / "sotu" / "addresses.jsonl").read_text().splitlines()[:2]:
        text = json.loads(line)["text"]
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        lengths["characters"] += len(text)
        lengths["tokens"] += len(ids)
    assert 3.5 < lengths["characters"] / lengths["tokens"] < 5.5


# ---- n-grams


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
    monkeypatch.setattr(ngram, "_SCORED_AT_ONCE", 77)
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
