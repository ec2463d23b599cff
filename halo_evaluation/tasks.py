"""The three kinds of task: exact answers, multiple choice, and perplexity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from halo_evaluation.interface import Group, ScoreBatch, TokenScores
from halo_evaluation.rows import TokenRow, batches_of, scores_of


@dataclass(frozen=True)
class EvaluationTask(ABC):
    """A fixed set of items. `name` is unique within a suite; `rows` has the rows of all items."""

    name: str
    group: Group
    rows: Sequence[TokenRow]

    def batches(self, tokens_per_batch: int) -> Iterator[ScoreBatch]:
        """Batches of at most `tokens_per_batch` tokens, padding included, or of one row."""
        return batches_of(self.rows, tokens_per_batch)

    @abstractmethod
    def metrics(self, scores: Sequence[TokenScores]) -> dict[str, float]:
        """Metrics from one TokenScores per batch, in the order of `batches`; "score" in [0, 1] is the headline."""


@dataclass(frozen=True)
class AnswerTask(EvaluationTask):
    """Answers that greedy generation has to produce exactly. One row per item; its targets are the answer."""

    def metrics(self, scores: Sequence[TokenScores]) -> dict[str, float]:
        """score: share of exact answers; token_accuracy; answer_log_probability: mean per token, in nats; items."""
        answers = scores_of(self.rows, scores)
        return {
            "score": float(np.mean([answer.is_greedy.all() for answer in answers])),
            "token_accuracy": float(np.concatenate([answer.is_greedy for answer in answers]).mean()),
            "answer_log_probability": float(
                np.concatenate([answer.log_probability for answer in answers]).mean()
            ),
            "items": float(len(answers)),
        }


@dataclass(frozen=True)
class ChoiceItem:
    """One context with several continuations, one row per choice. The targets of a row are its continuation."""

    rows: tuple[TokenRow, ...]
    sizes: tuple[int, ...]  # bytes of each continuation
    correct: int


@dataclass(frozen=True)
class ChoiceTask(EvaluationTask):
    """The model chooses the continuation with the highest log-probability per byte, on a tie the first."""

    items: Sequence[ChoiceItem]

    def metrics(self, scores: Sequence[TokenScores]) -> dict[str, float]:
        """score: share of right choices; probability: mean softmax, over choices, of the log-probability per byte of
        the right one; answer_log_probability: mean per token of the right continuations, in nats; items."""
        continuations = iter(scores_of(self.rows, scores))
        right, shares, correct_tokens = [], [], []
        for item in self.items:
            choices = [next(continuations) for _ in item.rows]
            sums = np.array([choice.log_probability.sum(dtype=np.float64) for choice in choices])
            per_byte = sums / np.array(item.sizes)
            weights = np.exp(per_byte - per_byte.max())
            right.append(int(per_byte.argmax()) == item.correct)
            shares.append(weights[item.correct] / weights.sum())
            correct_tokens.append(choices[item.correct].log_probability)
        return {
            "score": float(np.mean(right)),
            "probability": float(np.mean(shares)),
            "answer_log_probability": float(np.concatenate(correct_tokens).mean()),
            "items": float(len(self.items)),
        }


@dataclass(frozen=True)
class PerplexityTask(EvaluationTask):
    """Perplexity over all tokens of all rows, except for the first token of each row."""

    def metrics(self, scores: Sequence[TokenScores]) -> dict[str, float]:
        """loss in nats per token; perplexity = exp(loss); score = 1 / perplexity; items."""
        rows = scores_of(self.rows, scores)
        loss = -float(np.concatenate([row.log_probability for row in rows]).mean(dtype=np.float64))
        return {
            "score": float(np.exp(-loss)),
            "perplexity": float(np.exp(loss)),
            "loss": loss,
            "items": float(len(self.rows)),
        }
