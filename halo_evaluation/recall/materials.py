"""The ingredients of episodes and evaluation items: prose, an encoder, words, and segments of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

# Extra tokens to make up for removed EOS tokens. Documents are far longer, so one read nearly always suffices.
_SPARE_TOKENS = 16
_CACHED_ENCODINGS = 65_536


class TokenSource(Protocol):
    """Token ids with random access, such as a TokenStore."""

    @property
    def num_tokens(self) -> int: ...

    def read(self, start: int, length: int) -> np.ndarray:
        """uint32 [length]"""


@dataclass(frozen=True)
class Segment:
    """Token ids int64 [n]. `is_answer` marks tokens that can only be predicted by recall."""

    ids: np.ndarray
    is_answer: bool = False


def segment(ids: Sequence[int], *, is_answer: bool = False) -> Segment:
    return Segment(np.asarray(ids, np.int64), is_answer)


def total_length(segments: Iterable[Segment]) -> int:
    return sum(len(piece.ids) for piece in segments)


def join(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 [n] and answer mask bool [n]."""
    ids = np.concatenate([piece.ids for piece in segments])
    is_answer = np.zeros(len(ids), bool)
    position = 0
    for piece in segments:
        is_answer[position : position + len(piece.ids)] = piece.is_answer
        position += len(piece.ids)
    return ids, is_answer


def insert(haystack: np.ndarray, insertions: Iterable[tuple[int, Sequence[int]]]) -> list[Segment]:
    """`haystack` int64 [n] with ids inserted before token `position` in [0, n], for each (position, ids)."""
    pieces, last = [], 0
    for position, ids in sorted(insertions, key=lambda insertion: insertion[0]):
        pieces += [Segment(haystack[last:position]), segment(ids)]
        last = position
    return [*pieces, Segment(haystack[last:])]


def _table(flags: Iterable[bool]) -> np.ndarray:
    """bool [vocabulary]"""
    return np.fromiter(flags, bool)


class Materials:
    """Prose of one token source, its tokenizer, and the words that may be keys.

    Texts are encoded in pieces (template, key, value) whose ids are concatenated. Pieces begin with a space or newline,
    where pre-tokenizers such as Qwen's split anyway, so the ids equal those of the whole text. With other tokenizers a
    value still has the same ids in the statement and in the answer.
    """

    def __init__(self, source: TokenSource, tokenizer_file: Path, eos_id: int, words: Sequence[str]):
        """`tokenizer_file` is a tokenizer.json. ValueError if `source` is empty."""
        if source.num_tokens == 0:
            raise ValueError(
                "the token store for recall tasks is empty; tokenize at least one document of prose"
            )
        self.words = words
        self.eos_id = eos_id
        self._source = source
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._tokenizer.encode_special_tokens = (
            True  # encode them as ordinary text: passages are decoded and encoded again
        )
        vocabulary = self._tokenizer.get_vocab_size(with_added_tokens=True)
        texts = self._tokenizer.decode_batch([[token] for token in range(vocabulary)])
        self._stops = _table(text.endswith(".") for text in texts)
        self._stops_and_breaks = _table(
            text != text.rstrip() and text.rstrip().endswith(".") for text in texts
        )
        self._begins_blank = _table(text != text.lstrip() for text in texts)
        special = self._tokenizer.get_added_tokens_decoder()
        self._ordinary_ids = np.array(
            [token for token in range(vocabulary) if token not in special], np.int64
        )
        self.encode = lru_cache(maxsize=_CACHED_ENCODINGS)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: np.ndarray) -> str:
        """Text of token ids [n] without special tokens."""
        return self._tokenizer.decode(ids.tolist())

    def prose(self, rng: Random, length: int) -> np.ndarray:
        """Prose int64 [length] from a random position, without EOS. Continues elsewhere if that is too short."""
        parts = [np.empty(0, np.int64)]
        missing = length
        while missing > 0:
            wanted = min(missing + _SPARE_TOKENS, self._source.num_tokens)
            piece = self._source.read(rng.randrange(self._source.num_tokens - wanted + 1), wanted)
            parts.append(piece[piece != self.eos_id][:missing].astype(np.int64))
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def random_tokens(self, rng: Random, length: int) -> np.ndarray:
        """Random tokens int64 [length], without special tokens."""
        return self._ordinary_ids[rng.choices(range(len(self._ordinary_ids)), k=length)]

    def sentence_ends(self, ids: np.ndarray) -> np.ndarray:
        """Ascending positions in (0, n] after each full stop in `ids` [n] that precedes white space or the end."""
        blank_follows = np.append(self._begins_blank[ids[1:]], True)[: len(ids)]
        return np.flatnonzero(self._stops[ids] & blank_follows | self._stops_and_breaks[ids]) + 1
