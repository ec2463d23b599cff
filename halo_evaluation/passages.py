"""Sentences of held-out documents, from which the text tasks take their items."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Protocol

import numpy as np

from halo_evaluation.recall.materials import Materials, TokenSource

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WHITE_SPACE = re.compile(r"\s+")
_MAX_DOCUMENT_TOKENS = 20_000  # a longer document would crowd out the others
_MAX_PER_DOCUMENT = 32  # unless there are few documents
_CANDIDATES_PER_ITEM = 4


class DocumentSource(TokenSource, Protocol):
    """A token source with document boundaries, such as a TokenStore."""

    @property
    def document_offsets(self) -> np.ndarray:
        """int64 [documents + 1]"""


def split_sentences(text: str) -> list[str]:
    """Sentences of a text: split after . ! ? before white space, with runs of white space collapsed."""
    return _SENTENCE_END.split(_WHITE_SPACE.sub(" ", text).strip())


def is_prose(sentence: str, shortest: int, longest: int) -> bool:
    """Whether a sentence has `shortest` to `longest` characters, mostly letters and spaces, and ends with . ! or ?.

    This leaves out the tables and commands of documentation.
    """
    if not (
        shortest <= len(sentence) <= longest and sentence.endswith((".", "!", "?")) and sentence[0].isupper()
    ):
        return False
    return sum(character.isalpha() or character == " " for character in sentence) >= 0.9 * len(sentence)


def _documents(store: DocumentSource, materials: Materials, rng: Random) -> Iterator[list[str]]:
    """Sentences of each document, documents in random order."""
    offsets = store.document_offsets
    order = list(range(len(offsets) - 1))
    rng.shuffle(order)
    for document in order:
        start, end = int(offsets[document]), int(offsets[document + 1])
        yield split_sentences(materials.decode(store.read(start, min(end - start, _MAX_DOCUMENT_TOKENS))))


def gather[Candidate](
    store: DocumentSource,
    materials: Materials,
    rng: Random,
    items: int,
    candidates_of: Callable[[Sequence[str]], list[Candidate]],
    task: str,
) -> list[Candidate]:
    """A random choice of up to `items` candidates that `candidates_of` finds in the sentences of held-out documents.

    ValueError names `task` if there are none.
    """
    wanted = items * _CANDIDATES_PER_ITEM
    per_document = max(_MAX_PER_DOCUMENT, math.ceil(wanted / (len(store.document_offsets) - 1)))
    found: dict[Candidate, None] = {}  # an ordered set: documents may quote the same text
    for sentences in _documents(store, materials, rng):
        candidates = candidates_of(sentences)
        found.update(dict.fromkeys(rng.sample(candidates, min(len(candidates), per_document))))
        if len(found) >= wanted:
            break
    if not found:
        raise ValueError(
            f"{task}: the held-out documents have no suitable sentences; hold out more running text"
        )
    return rng.sample(list(found), min(len(found), items))
