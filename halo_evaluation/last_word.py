"""The last word of a held-out passage, which also occurs earlier in it. A local proxy of LAMBADA (arXiv 1606.06031)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from halo_evaluation.passages import DocumentSource, gather, is_prose
from halo_evaluation.recall.materials import Materials, segment
from halo_evaluation.rows import TokenRow
from halo_evaluation.tasks import AnswerTask

NAME = "local_last_word"
_LAST_SENTENCE = re.compile(r"^(.*[A-Za-z,;]) ([A-Za-z]{5,})[.!?]$")
_PASSAGE_CHARACTERS = 600
_MIN_SENTENCES_BEFORE = 2


def _sentences_before(sentences: Sequence[str], index: int) -> list[str]:
    """The sentences directly before `index`, up to _PASSAGE_CHARACTERS in total."""
    start, characters = index, 0
    while start > 0 and characters + len(sentences[start - 1]) <= _PASSAGE_CHARACTERS:
        start -= 1
        characters += len(sentences[start])
    return list(sentences[start:index])


def _passages(sentences: Sequence[str]) -> list[tuple[str, str]]:
    """(passage without its last word, last word) of every passage whose last word occurs earlier in it."""
    found = []
    for index, sentence in enumerate(sentences):
        match = _LAST_SENTENCE.match(sentence)
        if match is None or not is_prose(sentence, 30, 300):
            continue
        before = _sentences_before(sentences, index)
        earlier = " ".join(before)
        if len(before) >= _MIN_SENTENCES_BEFORE and re.search(rf"\b{match[2]}\b", earlier):
            found.append((f"{earlier} {match[1]}", match[2]))
    return found


def last_word_task(store: DocumentSource, materials: Materials, items: int, seed: int | str) -> AnswerTask:
    """Up to `items` passages of about 600 characters; ValueError if there are none."""
    rng = Random(f"{seed}/last_word")
    rows = [
        TokenRow.of([segment(materials.encode(passage)), segment(materials.encode(f" {word}"), is_answer=True)])
        for passage, word in gather(store, materials, rng, items, _passages, NAME)
    ]
    return AnswerTask(NAME, "commonsense", rows)
