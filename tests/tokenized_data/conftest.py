"""Small stores and a small tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenized_data import TokenizerIdentity, TokenStore, TokenStoreWriter

SHARD_TOKENS = 32_768
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IDENTITY = TokenizerIdentity("tiny", "a" * 64, 1_000, 0)


@pytest.fixture
def random_documents() -> list[np.ndarray]:
    """About 79,000 ids: two full shards and a partial one."""
    rng = np.random.default_rng(3)
    return [rng.integers(0, IDENTITY.vocab_size, length) for length in rng.integers(1, 9_000, 18)]


@pytest.fixture
def write_store(tmp_path: Path) -> Callable[..., Path]:
    """Write documents to a store with small shards. The weight of id n is n % 5."""

    def write(documents: Sequence[np.ndarray], name: str = "store", *, weighted: bool = False) -> Path:
        folder = tmp_path / name
        with TokenStoreWriter(
            folder, IDENTITY, provenance={"made_by": "test"}, loss_weights=weighted, shard_tokens=SHARD_TOKENS
        ) as writer:
            for ids in documents:
                writer.add_document(ids, ids % 5 if weighted else None)
        return folder

    return write


@pytest.fixture
def counting_store(write_store: Callable[..., Path]) -> Callable[[int, str], TokenStore]:
    """A store of `length` tokens 0, 1, ... 999, 0, 1 ..."""
    return lambda length, name: TokenStore.open(write_store([np.arange(length) % 1_000], name))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that splits words like Qwen's. <|end|> is token 0.

    Saved with a truncation and a padding that must not take effect.
    """
    folder = tmp_path_factory.mktemp("tokenizers") / "tiny"
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the river near the harbour feeds the garden.\n"] * 3, trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    return folder
