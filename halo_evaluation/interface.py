"""The interface between tasks and models: a model scores given tokens under teacher forcing.

No text is generated. Greedy generation produces the answer a_1 ... a_n exactly if every a_i is the arg max given the
prompt and a_1 ... a_(i-1). For a causal model one forward pass over prompt + answer decides this. The pass also gives
log-probabilities, which improve before exact matches do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Group = Literal["recall", "commonsense", "perplexity"]


@dataclass(frozen=True)
class ScoreBatch:
    """Token sequences that are scored together.

    input_ids: int64 [items, length], padded on the right. Models are causal, so padding changes no score.
    target_mask: bool [items, length], True where the token is to be predicted from those before it; never at 0.
    """

    input_ids: np.ndarray
    target_mask: np.ndarray


@dataclass(frozen=True)
class TokenScores:
    """The scores of a model for one ScoreBatch.

    log_probability: float32 [items, length], log p(token | all before it) in nats, 0 where not a target.
    is_greedy: bool [items, length], True where the token is a target and the model's arg max.
    """

    log_probability: np.ndarray
    is_greedy: np.ndarray


Scorer = Callable[[ScoreBatch], TokenScores]
"""A model that scores one batch in one forward pass."""
