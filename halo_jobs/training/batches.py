"""From sample numbers to tensors. There is no loader state: step n reads samples n * global_batch onwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokenized_data import Window


class Sampler(Protocol):
    def window(self, sample: int) -> Window: ...


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch: input_ids, labels int64 [micro_batch, context_length]; loss_weights fp32 of the same shape."""

    input_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    samples: tuple[int, ...]


@dataclass(frozen=True)
class BatchCursor:
    """Deterministic batches of one data-parallel rank; sample order is independent of the world size."""

    sampler: Sampler
    global_batch: int
    micro_batch: int
    device: torch.device
    data_rank: int = 0
    data_ranks: int = 1

    def __post_init__(self) -> None:
        if self.global_batch % (self.micro_batch * self.data_ranks):
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch} times "
                f"{self.data_ranks} data-parallel ranks; change one of them"
            )

    def step_samples(self, step: int) -> list[tuple[int, ...]]:
        """Sample numbers of this rank's micro-batches in (0-based) step `step`."""
        stride = self.micro_batch * self.data_ranks
        starts = range(step * self.global_batch, (step + 1) * self.global_batch, stride)
        offset = self.data_rank * self.micro_batch
        return [tuple(range(start + offset, start + offset + self.micro_batch)) for start in starts]

    def batches(self, step: int) -> list[TokenBatch]:
        return [self._collate(samples) for samples in self.step_samples(step)]

    def _collate(self, samples: tuple[int, ...]) -> TokenBatch:
        windows = [self.sampler.window(sample) for sample in samples]
        tokens = torch.from_numpy(np.stack([w.tokens for w in windows])).to(self.device)
        weights = torch.from_numpy(np.stack([w.loss_weights for w in windows])).to(self.device)
        return TokenBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights, samples)
