"""Sentences of held-out documents, from which the text tasks cut their items."""

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
_LONGEST_DOCUMENT = 20_000  # tokens; more of one document would crowd out the others
_MOST_PER_DOCUMENT = 32  # unless there are few documents
_CANDIDATES_PER_ITEM = 4


class DocumentSource(TokenSource, Protocol):
    """A token store with document boundaries; a TokenStore is one."""

    @property
    def document_offsets(self) -> np.ndarray:
        """int64 [documents + 1]"""


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, white space made single; cut after every . ! ? before white space."""
    return _SENTENCE_END.split(_WHITE_SPACE.sub(" ", text).strip())


def is_prose(sentence: str, shortest: int, longest: int) -> bool:
    """Whether a sentence has that many characters, mostly letters and blanks, and ends as sentences do.

    Documentation is full of tables and commands, which would make the tasks about layout.
    """
    if not (
        shortest <= len(sentence) <= longest and sentence.endswith((".", "!", "?")) and sentence[0].isupper()
    ):
        return False
    return sum(character.isalpha() or character == " " for character in sentence) >= 0.9 * len(sentence)


def _documents(store: DocumentSource, materials: Materials, rng: Random) -> Iterator[list[str]]:
    """Sentences of each document, in random order of documents."""
    offsets = store.document_offsets
    order = list(range(len(offsets) - 1))
    rng.shuffle(order)
    for document in order:
        start, end = int(offsets[document]), int(offsets[document + 1])
        yield split_sentences(materials.decode(store.read(start, min(end - start, _LONGEST_DOCUMENT))))


def gather[Candidate](
    store: DocumentSource,
    materials: Materials,
    rng: Random,
    items: int,
    candidates_of: Callable[[Sequence[str]], list[Candidate]],
    task: str,
) -> list[Candidate]:
    """Up to `items` of the candidates that `candidates_of` finds in the sentences of held-out documents.

    ValueError when there is none at all.
    """
    wanted = items * _CANDIDATES_PER_ITEM
    per_document = max(_MOST_PER_DOCUMENT, math.ceil(wanted / (len(store.document_offsets) - 1)))
    found: dict[Candidate, None] = {}  # a set in order: documents may quote the same text
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
