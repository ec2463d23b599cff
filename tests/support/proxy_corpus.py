"""A tiny corpus, tokenizer and word list for the tests of recall episodes and evaluation tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from halo_evaluation.recall.materials import Materials
from halo_evaluation.recall.words import WordSplit

EOS_ID = 0
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NOUNS = (
    "harbour",
    "captain",
    "garden",
    "letter",
    "window",
    "river",
    "bridge",
    "teacher",
    "village",
    "lantern",
)
_VERBS = ("watched", "carried", "painted", "followed", "remembered", "crossed", "visited", "described")
_LINKS = ("while", "because", "although", "after")
WORDS = WordSplit(
    training=tuple(
        first + second
        for first in ("bra", "cli", "dro", "fle", "gru")
        for second in ("mane", "tory", "sky", "lin")
    ),
    held_out=tuple(
        first + second for first in ("vex", "zum", "quo") for second in ("phant", "wizzle", "xandra", "jub")
    ),
)


def _sentence(rng: Random) -> str:
    one, two, three, four = (rng.choice(_NOUNS) for _ in range(4))
    return (
        f"The old {one} {rng.choice(_VERBS)} the {two} {rng.choice(_LINKS)}"
        f" another {three} {rng.choice(_VERBS)} the {four}."
    )


def documents() -> list[str]:
    """Twelve documents of sixty sentences; nouns recur, so that last words often occurred before."""
    rng = Random(5)
    return [" ".join(_sentence(rng) for _ in range(60)) for _ in range(12)]


def save_tokenizer(folder: Path) -> Path:
    """A byte-level BPE that cuts text as Qwen's does; <|endoftext|> is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    asked = "What is the special magic number for the value? Question: Answer: Remember that the secret access code of"
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*documents(), *[asked] * 20], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@dataclass(frozen=True)
class ArrayStore:
    """What the tasks need of a token store, in memory: ids uint32 [tokens], EOS after each document."""

    ids: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def document_offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.flatnonzero(self.ids == EOS_ID) + 1])

    def read(self, start: int, length: int) -> np.ndarray:
        return self.ids[start : start + length].copy()


def encode_documents(tokenizer: Tokenizer) -> list[np.ndarray]:
    """uint32 ids of each document, EOS included."""
    encoded = tokenizer.encode_batch(documents(), add_special_tokens=False)
    return [np.array([*document.ids, EOS_ID], np.uint32) for document in encoded]


@dataclass(frozen=True)
class Corpus:
    tokenizer_folder: Path
    tokenizer: Tokenizer
    store: ArrayStore

    @classmethod
    def build(cls, folder: Path) -> Corpus:
        tokenizer = Tokenizer.from_file(str(save_tokenizer(folder) / "tokenizer.json"))
        return cls(folder, tokenizer, ArrayStore(np.concatenate(encode_documents(tokenizer))))

    def materials(self, words: tuple[str, ...]) -> Materials:
        return Materials(self.store, self.tokenizer_folder / "tokenizer.json", EOS_ID, words)

    def decode(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
