"""Training objectives: cross entropy of the next token, KL to a teacher, or alignment of mixers.

`accumulate` of each objective runs Megatron's pipeline schedule over the micro-batches of a step, accumulates gradients
in the buffers of the model's chunks, and returns the mean loss of the step, an fp32 scalar. Sums over tokens are
divided by the loss weight of the global batch, so the result does not depend on how the batch is split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

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

from halo_training.batches import TokenBatch
from hypenet_kernels import chunked_cross_entropy, chunked_kl_divergence
from hypenet_megatron.alignment import Route
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel, LocalModel, model_chunks
from hypenet_megatron.runtime import ONE_PROCESS, ParallelLayout


def wrap_for_gradients(
    model: LocalModel, *, distributed_optimizer: bool = False, overlap: bool = False
) -> list[DistributedDataParallel]:
    """Megatron DDP around every model chunk: contiguous fp32 gradient buffers, reduced over data and context ranks.

    `overlap` communicates while computing (see `ParallelLayout`).
    """
    config: DecoderConfig = model_chunks(model)[0].config
    chunks = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=distributed_optimizer,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap and distributed_optimizer,
            ),
            chunk,
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(model_chunks(model))
    ]
    no_sync = [chunk.no_sync for chunk in chunks]
    config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    config.finalize_model_grads_func = finalize_model_grads
    return chunks


def gather_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Gather the last update on every rank now, if `overlap_param_gather` left that to the next forward pass."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _run_schedule(
    forward_step: Callable[..., Any],
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[TokenBatch],
    *,
    forward_only: bool,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Run Megatron's schedule for this layout. Every chunk iterates over all batches."""
    micro_batch, slice_length = batches[0].input_ids.shape
    interleaved = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(batches),
        seq_length=slice_length * parallel_state.get_context_parallel_world_size(),
        micro_batch_size=micro_batch,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )


def _sum_over_data(value: Tensor) -> Tensor:
    """Sum in place over data-parallel and context-parallel ranks, which have the same weights and different tokens."""
    dist.all_reduce(value, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return value


def _by_token(x: Tensor) -> Tensor:
    """From [b, s] to [s * b], the token order of Megatron's hidden states."""
    return x.t().reshape(-1)


class _HiddenStateObjective:
    """Base of the losses of final hidden states, which exist on the last pipeline stage."""

    def __init__(self, model: LocalModel, layout: ParallelLayout = ONE_PROCESS):
        self.model = model
        self.head = model_chunks(model)[-1]
        self.chunks = wrap_for_gradients(
            model, distributed_optimizer=layout.distributed_optimizer, overlap=layout.overlap
        )

    def _token_loss(self, rows: Tensor, batch: TokenBatch, token_weights: Tensor) -> Tensor:
        """Weighted sum of the losses of rows [s * b, d]; token_weights [s * b]. Both are in Megatron's token order."""
        raise NotImplementedError

    def accumulate(self, batches: Sequence[TokenBatch]) -> Tensor:
        total_weight = _sum_over_data(torch.stack([batch.loss_weights.sum() for batch in batches]).sum())
        total_loss = torch.zeros((), device=total_weight.device)
        # Megatron divides the loss by the number of micro-batches and averages gradients over data ranks; the scale
        # undoes both. It also averages over context ranks, which its schedule undoes.
        scale = len(batches) * parallel_state.get_data_parallel_world_size()

        def loss_of(batch: TokenBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            rows = self.head.head_input(hidden).flatten(0, 1)
            loss = self._token_loss(rows, batch, _by_token(batch.loss_weights) / total_weight)
            total_loss.add_(loss.detach())
            return loss * scale, {}

        def forward_step(
            batches: Iterator[TokenBatch], model: torch.nn.Module
        ) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches)
            return model(batch.input_ids), partial(loss_of, batch)

        _run_schedule(forward_step, self.chunks, batches, forward_only=False)
        # Only the last pipeline stage has a loss.
        dist.broadcast(
            _sum_over_data(total_loss),
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        return total_loss


class NextTokenObjective(_HiddenStateObjective):
    """Cross entropy of the next token (pretrain, finetune)."""

    def _token_loss(self, rows: Tensor, batch: TokenBatch, token_weights: Tensor) -> Tensor:
        return chunked_cross_entropy(
            rows,
            self.head.head_weight(),
            _by_token(batch.labels),
            token_weights,
            group=self.head.pg_collection.tp,
        )


class DistillationObjective(_HiddenStateObjective):
    """KL(teacher || student). The frozen teacher runs a forward-only schedule first. The last pipeline stage keeps its
    final hidden states, never its logits."""

    def __init__(self, model: LocalModel, teacher: LocalModel, layout: ParallelLayout = ONE_PROCESS) -> None:
        super().__init__(model, layout)
        teacher.eval().requires_grad_(False)
        self.teacher = model_chunks(teacher)
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
        # The last pipeline stage processes micro-batches in order in both schedules.
        teacher = self.teacher[-1]
        return chunked_kl_divergence(
            rows,
            self.head.head_weight(),
            teacher.head_input(next(self._teacher_hidden)).flatten(0, 1),
            teacher.head_weight(),
            token_weights,
            group=self.head.pg_collection.tp,
        )


class AlignmentObjective:
    """HALO stage 1: mean squared error between every student mixer and its teacher, in all layers at once.

    No gradient passes between layers. Every pipeline stage runs a forward-only schedule, sends the teacher's residual
    stream on, and calls backward for its own mixers.
    """

    def __init__(self, model: LocalModel, layout: ParallelLayout = ONE_PROCESS):
        self.model = model
        parts = model_chunks(model)
        for part in parts:
            for name, parameter in part.named_parameters():
                parameter.requires_grad_(".student." in name)
            part.set_route(Route.ALIGN)
        self.config: DecoderConfig = parts[0].config
        # No overlap: Megatron starts overlapped reductions in its backward schedule, which does not run here.
        self.chunks = wrap_for_gradients(model, distributed_optimizer=layout.distributed_optimizer)

    def accumulate(self, batches: Sequence[TokenBatch]) -> Tensor:
        total = torch.zeros((), device=batches[0].input_ids.device)
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        # The loss of a mixer is a mean over its tokens. With sequence parallelism these are the tokens of one tensor
        # rank, and the gradients of the tensor ranks add up.
        shares = tensor_group.size() if self.config.sequence_parallel else 1
        parts = self.config.num_layers * len(batches) * shares

        def forward_step(
            batches: Iterator[TokenBatch], model: DistributedDataParallel
        ) -> tuple[Tensor, Callable[..., Any]]:
            # The teacher runs without a graph. Each aligned mixer enables gradients for its student only.
            hidden = model(next(batches).input_ids)
            part: DecoderModel = model.module
            losses = [mixer.loss for mixer in part.aligned_mixers()]
            loss = torch.stack([x for x in losses if x is not None]).sum() / parts
            loss.backward()
            total.add_(loss.detach())
            return hidden, lambda hidden, non_loss_data=False: (hidden.sum() * 0, {})

        with ExitStack() as without_reduction:
            for chunk in self.chunks:
                without_reduction.enter_context(chunk.no_sync())
            _run_schedule(forward_step, self.chunks, batches, forward_only=True)
        finalize_model_grads(self.chunks)
        data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        total = _sum_over_data(total / data_group.size())
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        if shares > 1:
            dist.all_reduce(total, group=tensor_group)
        return total


Objective = NextTokenObjective | DistillationObjective | AlignmentObjective
"""A trainable model (`model`, and its `chunks` with gradient buffers) together with its loss."""
