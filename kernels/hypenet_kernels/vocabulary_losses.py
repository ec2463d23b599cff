"""Cross entropy and KL divergence straight from hidden states, a chunk of tokens at a time.

Teacher and student logits over the vocabulary exist only for `chunk_tokens` tokens at once (None: a size that suits the
device). The gradients are formed in the forward pass, while a chunk's logits are there, and only scaled in the backward
pass: no logits are recomputed. On CUDA logits are fp32 straight from the matrix product, Triton kernels read them once
for the loss and once for the gradient, and the weight's gradient is accumulated in place, in fp32.

Shapes: hidden [tokens, hidden_size]; weight [vocab / tp, hidden_size]; labels, token_weights [tokens]. With a
tensor-parallel `group`, every rank holds a slice of the vocabulary (rank r: rows r * vocab / tp ...) and ranks combine
by one max and one sum of a few numbers per token. Results are fp32 scalars: sum over tokens of token_weight * loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hypenet_kernels.softmax_rows import softmax_row_gradients, softmax_row_statistics

# Logits alive at once. On CPU a chunk should stay in the cache (1M fp32 = 4 MB, several times faster than 64 MB);
# on a GPU it should fill the chip: 64M fp32 of the student and of the teacher, and their gradient, take 640 MiB.
_CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**26}
_ROWS_OF_A_PRODUCT = 64  # matrix products like multiples of this


def default_chunk_tokens(hidden: Tensor, vocabulary: int) -> int:
    """Tokens per chunk for this device and (local) vocabulary size: a multiple of 64."""
    tokens = _CHUNK_LOGITS[hidden.device.type] // vocabulary
    return max(1, tokens // _ROWS_OF_A_PRODUCT) * _ROWS_OF_A_PRODUCT


def _reduce(values: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(values, op=op, group=group)
    return values


class _SoftmaxParts:
    """logits - max and its exponential for this rank's vocabulary slice, and the whole vocabulary's sum of those, fp32.

    The max is over the whole vocabulary. Takes over the memory of `logits` when those are fp32.
    """

    def __init__(self, logits: Tensor, group: dist.ProcessGroup | None):
        logits = logits.float()
        shift = _reduce(logits.amax(-1), group, dist.ReduceOp.MAX)
        self.shifted = logits.sub_(shift[:, None])
        self.exponential = self.shifted.exp()
        self.total = _reduce(self.exponential.sum(-1), group, dist.ReduceOp.SUM)

    def take_probabilities(self) -> Tensor:
        """softmax, in the memory of `exponential`, which is gone afterwards."""
        return self.exponential.mul_(self.total.reciprocal()[:, None])


def _first_label(vocabulary: int, group: dist.ProcessGroup | None) -> int:
    return group.rank() * vocabulary if group is not None else 0


def _cross_entropy_chunk(
    logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Per-token loss [chunk] and its gradient with respect to this rank's logits."""
    parts = _SoftmaxParts(logits, group)
    local = labels - _first_label(logits.shape[-1], group)
    mine = (local >= 0) & (local < logits.shape[-1])
    index = local.clamp(0, logits.shape[-1] - 1)[:, None]
    target = parts.shifted.gather(-1, index)[:, 0] * mine
    loss = parts.total.log() - _reduce(target, group, dist.ReduceOp.SUM)
    gradient = parts.take_probabilities()
    gradient.scatter_add_(-1, index, -mine.float()[:, None])
    return loss, gradient


def _kl_chunk(
    logits: Tensor, teacher_logits: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Per-token KL(teacher || student) [chunk] and its gradient with respect to this rank's student logits."""
    student, teacher = _SoftmaxParts(logits, group), _SoftmaxParts(teacher_logits, group)
    gap = teacher.shifted.sub_(student.shifted)
    cross = gap.mul_(teacher.exponential).sum(-1)
    mean_gap = _reduce(cross, group, dist.ReduceOp.SUM) / teacher.total
    loss = mean_gap - teacher.total.log() + student.total.log()
    return loss, student.take_probabilities().sub_(teacher.take_probabilities())


def _torch_chunk(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher_weight: Tensor | None,
    token_weights: Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Per-token loss [chunk] and the weighted gradient of this rank's logits [chunk, vocab / tp], in hidden's dtype."""
    logits = hidden @ weight.t()
    if teacher_weight is None:
        loss, gradient = _cross_entropy_chunk(logits, target, group)
    else:
        loss, gradient = _kl_chunk(logits, target @ teacher_weight.t(), group)
    return loss, gradient.mul_(token_weights[:, None]).to(hidden.dtype)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32; on CUDA without rounding to the inputs' dtype in between, and without fp32 copies of them."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _kernel_chunk(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher_weight: Tensor | None,
    token_weights: Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """What `_torch_chunk` returns, with two readings of the logits; ranks combine by one max and one sum."""
    student = _wide_product(hidden, weight.t())
    teacher = None if teacher_weight is None else _wide_product(target, teacher_weight.t())
    labels = target.contiguous() if teacher_weight is None else None
    first_label = _first_label(weight.shape[0], group)
    own_maxima, sums = softmax_row_statistics(student, teacher, labels, first_label)
    maxima = _reduce(own_maxima.clone(), group, dist.ReduceOp.MAX)
    fade = (own_maxima - maxima).exp()
    sums[: len(fade)] *= fade
    if teacher is not None:
        sums[2] *= fade[1]
    sums = _reduce(sums, group, dist.ReduceOp.SUM)
    log_totals = maxima + sums[: len(maxima)].log()
    loss = log_totals[0] - sums[1] if teacher is None else sums[2] / sums[1] - log_totals[1] + log_totals[0]
    gradient = softmax_row_gradients(
        student, teacher, labels, first_label, log_totals, token_weights, hidden.dtype
    )
    return loss, gradient


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, total fp32; on CUDA inside the matrix product."""
    if total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total += a @ b


def _uses_kernels(hidden: Tensor) -> bool:
    return hidden.is_cuda


class _ChunkedLoss(torch.autograd.Function):
    """Shared driver: walks over token chunks, accumulates the loss and, when wanted, both gradients."""

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
        loss_and_gradient = _kernel_chunk if _uses_kernels(hidden) else _torch_chunk
        wants_gradient = any(ctx.needs_input_grad[:2])
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden) if wants_gradient else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if wants_gradient else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            loss, gradient = loss_and_gradient(
                hidden[part], weight, target[part], teacher_weight, token_weights[part], group
            )
            total += (loss * token_weights[part]).sum()
            if hidden_gradient is not None and weight_gradient is not None:
                hidden_gradient[part] = _reduce(gradient @ weight, group, dist.ReduceOp.SUM)
                _add_product(weight_gradient, gradient.t(), hidden[part])
            del gradient  # before the next chunk's logits are made
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
    """sum_t token_weights[t] * -log softmax(hidden[t] weight^T)[labels[t]]; labels int64, result an fp32 scalar."""
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
    """sum_t token_weights[t] * KL(teacher_t || student_t), temperature 1; no gradient flows to the teacher."""
    return _ChunkedLoss.apply(
        hidden, weight, teacher_hidden.detach(), teacher_weight.detach(), token_weights, chunk_tokens, group
    )
