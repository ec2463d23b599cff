"""Which of four sentences comes next: the true one, or one of three others of the same document and similar length.

A local proxy of completion benchmarks such as HellaSwag. Scored by log-probability per byte; chance is 1/4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from halo_evaluation.passages import DocumentSource, gather, is_prose
from halo_evaluation.recall.materials import Materials, segment
from halo_evaluation.rows import TokenRow
from halo_evaluation.tasks import ChoiceItem, ChoiceTask

NAME = "local_next_sentence"
CHOICES = 4
_SENTENCES_BEFORE = 3
_SHORTEST, _LONGEST = 50, 240
_LENGTH_TOLERANCE = 0.25


@dataclass(frozen=True)
class _Question:
    context: str
    correct: str
    others: tuple[str, ...]  # all suitable wrong choices, at least CHOICES - 1


def _questions(sentences: Sequence[str]) -> list[_Question]:
    prose = [index for index, sentence in enumerate(sentences) if is_prose(sentence, _SHORTEST, _LONGEST)]
    questions = []
    for index in prose:
        before = sentences[max(0, index - _SENTENCES_BEFORE) : index]
        if not before or not all(is_prose(sentence, 20, 400) for sentence in before):
            continue
        correct = sentences[index]
        others = {
            sentences[other]: None
            for other in prose
            if abs(len(sentences[other]) - len(correct)) <= _LENGTH_TOLERANCE * len(correct)
            and sentences[other] != correct
            and sentences[other] not in before
        }
        if len(others) >= CHOICES - 1:
            questions.append(_Question(" ".join(before), correct, tuple(others)))
    return questions


def _item(materials: Materials, question: _Question, choices: Sequence[str]) -> ChoiceItem:
    context = segment(materials.encode(question.context))
    rows = (TokenRow.of([context, segment(materials.encode(f" {choice}"), is_answer=True)]) for choice in choices)
    return ChoiceItem(
        tuple(rows), tuple(len(choice.encode()) for choice in choices), choices.index(question.correct)
    )


def next_sentence_task(
    store: DocumentSource, materials: Materials, items: int, seed: int | str
) -> ChoiceTask:
    """Up to `items` questions; ValueError if there are none. The right choice has each position equally often."""
    rng = Random(f"{seed}/next_sentence")
    made = []
    for index, question in enumerate(gather(store, materials, rng, items, _questions, NAME)):
        choices = rng.sample(question.others, CHOICES - 1)
        choices.insert(index % CHOICES, question.correct)
        made.append(_item(materials, question, choices))
    return ChoiceTask(NAME, "commonsense", [row for item in made for row in item.rows], made)
