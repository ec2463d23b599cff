"""Cross entropy and KL divergence computed from hidden states, one chunk of tokens at a time.

Only the logits of `chunk_tokens` tokens exist at once (None: a size that suits the device). The forward pass computes
the gradients while a chunk's logits exist, and the backward pass only scales them, so no logits are recomputed. On CUDA
the matrix product returns fp32 logits, Triton kernels read them once for the loss and once for the gradient, and the
weight's gradient accumulates in place in fp32.

Shapes: hidden [tokens, hidden_size]; weight [vocab / tp, hidden_size]; labels, token_weights [tokens]. With a
tensor-parallel `group`, rank r holds the rows of the vocabulary from r * vocab / tp on, and the ranks exchange one
maximum and one sum of a few numbers per token. Results are fp32 scalars: the sum over tokens of token_weight * loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hypenet_kernels.softmax_rows import (
    plain_row_gradients,
    plain_row_statistics,
    softmax_row_gradients,
    softmax_row_statistics,
)

# Logits per chunk. On CPU a chunk should fit into the cache (1M fp32 are 4 MB, several times faster than 64 MB). On a
# GPU it should fill the chip: 64M fp32 logits of student and teacher, and their bf16 gradient, take 640 MiB.
_CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**26}
_ROW_MULTIPLE = 64  # matrix products are fastest with a multiple of this many rows


def default_chunk_tokens(hidden: Tensor, vocabulary: int) -> int:
    """Tokens per chunk for this device and (local) vocabulary size: a multiple of 64."""
    tokens = _CHUNK_LOGITS[hidden.device.type] // vocabulary
    return max(1, tokens // _ROW_MULTIPLE) * _ROW_MULTIPLE


def _reduce(values: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(values, op=op, group=group)
    return values


def _first_label(vocabulary: int, group: dist.ProcessGroup | None) -> int:
    return group.rank() * vocabulary if group is not None else 0


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden weight^T in fp32. On CUDA the product is not rounded to bf16 first."""
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return (hidden @ weight.t()).float()


def _chunk_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher_weight: Tensor | None,
    token_weights: Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Per-token loss [chunk] and the weighted gradient of this rank's logits [chunk, vocab / tp], in hidden's dtype.

    `target` are labels or, with `teacher_weight`, hidden states of the teacher. The ranks exchange one maximum and one
    sum.
    """
    statistics, gradients = _row_functions(hidden)
    student = _logits(hidden, weight)
    teacher = None if teacher_weight is None else _logits(target, teacher_weight)
    labels = target.contiguous() if teacher_weight is None else None
    first_label = _first_label(weight.shape[0], group)
    own_maxima, sums = statistics(student, teacher, labels, first_label)
    maxima = _reduce(own_maxima.clone(), group, dist.ReduceOp.MAX)
    fade = (own_maxima - maxima).exp()
    sums[: len(fade)] *= fade
    if teacher is not None:
        sums[2] *= fade[1]
    sums = _reduce(sums, group, dist.ReduceOp.SUM)
    log_totals = maxima + sums[: len(maxima)].log()
    loss = log_totals[0] - sums[1] if teacher is None else sums[2] / sums[1] - log_totals[1] + log_totals[0]
    gradient = gradients(student, teacher, labels, first_label, log_totals, token_weights, hidden.dtype)
    return loss, gradient


def _row_functions(hidden: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The kernels on CUDA, otherwise their references."""
    if hidden.is_cuda:
        return softmax_row_statistics, softmax_row_gradients
    return plain_row_statistics, plain_row_gradients


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b for an fp32 total; on CUDA inside the matrix product."""
    if total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total += a @ b


class _ChunkedLoss(torch.autograd.Function):
    """Both losses: goes through the chunks, accumulates the loss and, if needed, the gradients of hidden and weight."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        teacher_weight: Tensor | None,
        token_weights: Tensor,
        chunk_tokens: int | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        chunk_tokens = chunk_tokens or default_chunk_tokens(hidden, weight.shape[0])
        wants_gradient = any(ctx.needs_input_grad[:2])
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden) if wants_gradient else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if wants_gradient else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            loss, gradient = _chunk_loss(
                hidden[part], weight, target[part], teacher_weight, token_weights[part], group
            )
            total += (loss * token_weights[part]).sum()
            if hidden_gradient is not None and weight_gradient is not None:
                hidden_gradient[part] = _reduce(gradient @ weight, group, dist.ReduceOp.SUM)
                _add_product(weight_gradient, gradient.t(), hidden[part])
            del gradient  # free it before the next chunk's logits exist
        if hidden_gradient is not None and weight_gradient is not None:
            ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = upstream[0]
        return (
            hidden_gradient * scale.to(hidden_gradient.dtype),
            weight_gradient * scale.to(weight_gradient.dtype),
            *(None,) * 5,
        )


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """sum_t token_weights[t] * -log softmax(hidden[t] weight^T)[labels[t]], an fp32 scalar; labels int64."""
    return _ChunkedLoss.apply(hidden, weight, labels, None, token_weights, chunk_tokens, group)


def chunked_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """sum_t token_weights[t] * KL(teacher_t || student_t) at temperature 1. The teacher gets no gradient."""
    return _ChunkedLoss.apply(
        hidden, weight, teacher_hidden.detach(), teacher_weight.detach(), token_weights, chunk_tokens, group
    )
