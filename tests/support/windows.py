"""Training data for tests: random windows, and the batches that a rank takes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from halo_jobs.recipe import TrainingSection
from halo_training.batches import BatchCursor
from tokenized_data import Window


@dataclass(frozen=True)
class RandomWindows:
    """Sample n is the same random tokens and loss weights (1 or 4) everywhere; sample `poisoned` has weights of NaN, as
    a broken store might."""

    context_length: int
    vocab_size: int
    poisoned: int | None = None

    def window(self, sample: int) -> Window:
        rng = np.random.default_rng(sample)
        weights = np.where(rng.random(self.context_length) < 0.5, 1.0, 4.0).astype(np.float32)
        if sample == self.poisoned:
            weights[:] = math.nan
        return Window(rng.integers(0, self.vocab_size, self.context_length + 1), weights, "random", sample)


def cursor_of_this_rank(
    windows: RandomWindows, section: TrainingSection, device: torch.device | None = None
) -> BatchCursor:
    """The batches of this process in Megatron's present world."""
    device = device or torch.device("cpu")
    return BatchCursor.of_this_rank(windows, section.global_batch, section.micro_batch, device)
