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
    """One micro-batch: input_ids, labels int64 [micro_batch, context_length]; loss_weights fp32 of the same shape. With
    context parallelism, this rank's slice of each window."""

    input_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    samples: tuple[int, ...]


@dataclass(frozen=True)
class BatchCursor:
    """Deterministic batches of one rank.

    Which samples a step reads depends on the step and global_batch alone, so a run may go on in another world. They are
    dealt out in order: micro-batch n of the step goes to data-parallel rank n modulo their number. Context-parallel
    ranks read the same samples and take contiguous slices of the windows.
    """

    sampler: Sampler
    global_batch: int
    micro_batch: int
    device: torch.device
    data_rank: int = 0
    data_ranks: int = 1
    context_rank: int = 0
    context_ranks: int = 1

    def __post_init__(self) -> None:
        if self.global_batch % (self.micro_batch * self.data_ranks):
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch} times "
                f"{self.data_ranks} data-parallel ranks; change one of them"
            )

    def step_samples(self, step: int) -> list[tuple[int, ...]]:
        """Sample numbers of this rank's micro-batches in (0-based) step `step`."""
        samples = self.global_samples(step)
        starts = range(self.data_rank, len(samples) // self.micro_batch, self.data_ranks)
        return [tuple(samples[n * self.micro_batch : (n + 1) * self.micro_batch]) for n in starts]

    def global_samples(self, step: int) -> range:
        """All ranks' sample numbers of step `step`."""
        return range(step * self.global_batch, (step + 1) * self.global_batch)

    def batches(self, step: int) -> list[TokenBatch]:
        return [self._collate(samples) for samples in self.step_samples(step)]

    def _collate(self, samples: tuple[int, ...]) -> TokenBatch:
        windows = [self.sampler.window(sample) for sample in samples]
        tokens = torch.from_numpy(np.stack([w.tokens for w in windows])).to(self.device)
        weights = torch.from_numpy(np.stack([w.loss_weights for w in windows])).to(self.device)
        # Labels are shifted before windows are cut: the last label of a slice is the first token of the next.
        return TokenBatch(
            self._slice(tokens[:, :-1]), self._slice(tokens[:, 1:]), self._slice(weights), samples
        )

    def _slice(self, x: Tensor) -> Tensor:
        return x.chunk(self.context_ranks, 1)[self.context_rank].contiguous()
