"""What a task asks of a model and what a model answers: scores of given tokens under teacher forcing.

Why no text is generated: greedy generation of an answer a_1 ... a_n picks a_1 exactly if a_1 is the arg max after
the prompt; given that, it picks a_2 exactly if a_2 is the arg max after prompt + a_1; and so on. So "greedy generation
gives the answer" and "every answer token is the arg max given the true tokens before it" are the same statement, and
one forward pass over prompt + answer decides it, for all models that are causal. It also gives log-probabilities,
which move before exact matches do.

How lm-eval would plug in (not built): an `lm_eval.api.model.LM` whose `loglikelihood(requests)` encodes context and
continuation, puts them in one row with `target_mask` True on the continuation, calls the Scorer, and returns
(log_probability[row].sum(), is_greedy[row][target_mask[row]].all()); `loglikelihood_rolling` masks whole windows.
`generate_until` needs a cache and a sampling loop, so it belongs to the exported Hugging Face model, not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Group = Literal["recall", "commonsense", "perplexity"]


@dataclass(frozen=True)
class ScoreBatch:
    """Rows to be scored together.

    input_ids: int64 [items, length], padded on the right (models are causal, so padding changes no score).
    target_mask: bool [items, length], True where the token is to be predicted from those before it; never at 0.
    """

    input_ids: np.ndarray
    target_mask: np.ndarray


@dataclass(frozen=True)
class TokenScores:
    """What a model says about one ScoreBatch.

    log_probability: float32 [items, length], log p(token | all before it) in nats, 0 where not a target.
    is_greedy: bool [items, length], True where the token is a target and the model's arg max.
    """

    log_probability: np.ndarray
    is_greedy: np.ndarray


class Scorer(Protocol):
    """A model that scores one batch in one forward pass."""

    def __call__(self, batch: ScoreBatch) -> TokenScores: ...


class Task(Protocol):
    """A fixed set of items. `name` is unique within a suite."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> Group: ...

    def batches(self, tokens_per_batch: int) -> Iterator[ScoreBatch]:
        """Batches of at most `tokens_per_batch` tokens with padding, but always at least one row."""

    def metrics(self, scores: Sequence[TokenScores]) -> dict[str, float]:
        """One TokenScores per batch in the order of `batches`; "score" in [0, 1] is the headline number."""
