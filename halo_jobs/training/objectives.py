"""What one step minimises: next token, KL to a teacher, or mixer alignment.

Each runs Megatron's pipeline schedule over the micro-batches of a step, leaves gradients in the model's gradient
buffers and returns the step's mean loss. Sums over tokens are divided by the loss weight of the whole global batch, so
the result does not depend on how the batch was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from halo_jobs.training.batches import TokenBatch
from hypenet_kernels import chunked_cross_entropy, chunked_kl_divergence
from hypenet_megatron.alignment import Route
from hypenet_megatron.config import HypeNetConfig
from hypenet_megatron.model import HypeNetModel


class Objective(Protocol):
    """A trainable model together with its loss."""

    ddp: DistributedDataParallel

    def accumulate(self, batches: Sequence[TokenBatch]) -> Tensor:
        """Gradients of one global batch into the gradient buffers; returns the mean loss, fp32 scalar."""
        ...


def wrap_for_gradients(model: HypeNetModel) -> DistributedDataParallel:
    """Megatron DDP: contiguous fp32 gradient buffers, reduced over data-parallel ranks."""
    config: HypeNetConfig = model.config
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False),
        model,
    )
    config.no_sync_func = ddp.no_sync
    config.finalize_model_grads_func = finalize_model_grads
    return ddp


def _run_schedule(
    forward_step: Callable[..., Any],
    model: torch.nn.Module,
    batches: Sequence[TokenBatch],
    *,
    forward_only: bool,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    micro_batch, context_length = batches[0].input_ids.shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=context_length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )


def _total_loss_weight(batches: Sequence[TokenBatch]) -> Tensor:
    """Loss weight of the global batch over all data-parallel ranks."""
    weight = torch.stack([batch.loss_weights.sum() for batch in batches]).sum()
    dist.all_reduce(weight, group=parallel_state.get_data_parallel_group())
    return weight


class _LossMeter:
    """Adds up the step's loss on the last pipeline stage and shares it with all ranks."""

    def __init__(self, device: torch.device):
        self.value = torch.zeros((), device=device)

    def add(self, loss: Tensor) -> None:
        self.value += loss.detach()

    def everywhere(self) -> Tensor:
        dist.all_reduce(self.value, group=parallel_state.get_data_parallel_group())
        dist.broadcast(
            self.value,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        return self.value


def _by_token(x: Tensor) -> Tensor:
    """[b, s] of the data to the [s * b] token order of Megatron's hidden states."""
    return x.t().reshape(-1)


class _HiddenStateObjective:
    """Shared by the two losses that start from the final hidden states."""

    def __init__(self, model: HypeNetModel):
        self.model = model
        self.ddp = wrap_for_gradients(model)

    def _token_loss(self, rows: Tensor, batch: TokenBatch, token_weights: Tensor) -> Tensor:
        """Weighted sum of losses; rows [s * b, d], token_weights [s * b], both in Megatron's token order."""
        raise NotImplementedError

    def accumulate(self, batches: Sequence[TokenBatch]) -> Tensor:
        total_weight = _total_loss_weight(batches)
        meter = _LossMeter(total_weight.device)
        # Megatron divides the loss by the micro-batches and averages gradients over data ranks: undo both.
        scale = len(batches) * parallel_state.get_data_parallel_world_size()

        def loss_of(batch: TokenBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            rows = self.model.head_input(hidden).flatten(0, 1)
            loss = self._token_loss(rows, batch, _by_token(batch.loss_weights) / total_weight)
            meter.add(loss)
            return loss * scale, {}

        def forward_step(
            batches: Iterator[TokenBatch], model: torch.nn.Module
        ) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches)
            return model(batch.input_ids), partial(loss_of, batch)

        _run_schedule(forward_step, self.ddp, batches, forward_only=False)
        return meter.everywhere()


class NextTokenObjective(_HiddenStateObjective):
    """Cross entropy of the next token (pretrain, finetune)."""

    def _token_loss(self, rows: Tensor, batch: TokenBatch, token_weights: Tensor) -> Tensor:
        return chunked_cross_entropy(
            rows,
            self.model.head_weight(),
            _by_token(batch.labels),
            token_weights,
            group=self.model.pg_collection.tp,
        )


class DistillationObjective(_HiddenStateObjective):
    """KL(teacher || student). The frozen teacher runs its own forward-only schedule first; of it only the final
    hidden states stay, on the last stage, never the logits."""

    def __init__(self, model: HypeNetModel, teacher: HypeNetModel):
        super().__init__(model)
        self.teacher = teacher.eval().requires_grad_(False)
        self._teacher_hidden: Iterator[Tensor] = iter(())

    def accumulate(self, batches: Sequence[TokenBatch]) -> Tensor:
        def forward_step(
            batches: Iterator[TokenBatch], model: torch.nn.Module
        ) -> tuple[Tensor, Callable[..., Any]]:
            return model(next(batches).input_ids), lambda hidden, non_loss_data=True: hidden

        with torch.no_grad():
            self._teacher_hidden = iter(
                _run_schedule(
                    forward_step, self.teacher, batches, forward_only=True, collect_non_loss_data=True
                )
            )
        return super().accumulate(batches)

    def _token_loss(self, rows: Tensor, batch: TokenBatch, token_weights: Tensor) -> Tensor:
        return chunked_kl_divergence(
            rows,
            self.model.head_weight(),
            self.teacher.head_input(next(self._teacher_hidden)).flatten(0, 1),
            self.teacher.head_weight(),
            token_weights,
            group=self.model.pg_collection.tp,
        )


class AlignmentObjective:
    """HALO stage 1: mean squared distance of every student mixer to its teacher, all layers at once.

    Nothing flows backward between layers, so every pipeline stage runs forward only, sends the teacher's residual
    stream on and calls backward for its own mixers.
    """

    def __init__(self, model: HypeNetModel):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".student." in name)
        model.set_route(Route.ALIGN)
        self.model = model
        self.ddp = wrap_for_gradients(model)

    def accumulate(self, batches: Sequence[TokenBatch]) -> Tensor:
        layers = self.model.config.num_layers
        meter = _LossMeter(batches[0].input_ids.device)

        count = len(batches)

        def forward_step(
            batches: Iterator[TokenBatch], model: torch.nn.Module
        ) -> tuple[Tensor, Callable[..., Any]]:
            # The teacher runs without a graph; each aligned mixer switches gradients on for its student alone.
            hidden = model(next(batches).input_ids)
            losses = [mixer.loss for mixer in self.model.aligned_mixers()]
            loss = torch.stack([x for x in losses if x is not None]).sum() / (layers * count)
            loss.backward()
            meter.add(loss)
            return hidden, lambda hidden, non_loss_data=False: (hidden.sum() * 0, {})

        with self.ddp.no_sync():
            _run_schedule(forward_step, self.ddp, batches, forward_only=True)
        finalize_model_grads([self.ddp])
        total = meter.value / parallel_state.get_data_parallel_world_size()
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total
