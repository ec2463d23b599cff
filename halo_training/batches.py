"""Turns sample numbers into tensors. There is no loader state: step n reads samples n * global_batch onwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from tokenized_data import Window


class Sampler(Protocol):
    def window(self, sample: int) -> Window: ...


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch: input_ids, labels int64 [micro_batch, context_length], and loss_weights fp32 of that shape.

    With context parallelism every tensor is this rank's slice of the windows.
    """

    input_ids: Tensor
    labels: Tensor
    loss_weights: Tensor


@dataclass(frozen=True)
class BatchCursor:
    """The batches of one rank, as a function of the step.

    The samples of a step depend only on the step and global_batch, so training resumes at any parallel layout. Of the
    micro-batches of a step, number n belongs to data-parallel rank n modulo the number of these ranks. Context-parallel
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

    @classmethod
    def of_this_rank(
        cls, sampler: Sampler, global_batch: int, micro_batch: int, device: torch.device
    ) -> BatchCursor:
        """The cursor of this process in Megatron's parallel state."""
        return cls(
            sampler,
            global_batch,
            micro_batch,
            device,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_context_parallel_world_size(),
        )

    def global_samples(self, step: int) -> range:
        """Sample numbers of 0-based step `step`, of all ranks."""
        return range(step * self.global_batch, (step + 1) * self.global_batch)

    def batches(self, step: int) -> list[TokenBatch]:
        """This rank's micro-batches of 0-based step `step`."""
        samples = self.global_samples(step)
        first = self.data_rank * self.micro_batch
        starts = range(first, self.global_batch, self.data_ranks * self.micro_batch)
        return [self._collate(samples[start : start + self.micro_batch]) for start in starts]

    def _collate(self, samples: range) -> TokenBatch:
        windows = [self.sampler.window(sample) for sample in samples]
        tokens = torch.from_numpy(np.stack([w.tokens for w in windows])).to(self.device)
        weights = torch.from_numpy(np.stack([w.loss_weights for w in windows])).to(self.device)
        # Labels are shifted before windows are cut: the last label of a slice is the first token of the next slice.
        return TokenBatch(self._slice(tokens[:, :-1]), self._slice(tokens[:, 1:]), self._slice(weights))

    def _slice(self, x: Tensor) -> Tensor:
        return x.chunk(self.context_ranks, 1)[self.context_rank].contiguous()
