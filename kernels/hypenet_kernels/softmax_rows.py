"""Losses and gradients of rows of logits by the kernels of `triton_kernels/softmax_losses.py`.

Two operators, each reading the logits once. Their reference is torch's own log_softmax; `vocabulary_losses` has the
same arithmetic in PyTorch for other devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

STATISTICS_BLOCK, GRADIENT_BLOCK = 4096, 2048
WARPS = 8


def _rows(logits: Tensor) -> Tensor:
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(
            f"rows of logits must be contiguous float32, not {logits.dtype} with strides {logits.stride()}"
        )
    return logits


@torch.library.custom_op("hypenet::softmax_row_statistics", mutates_args=())
def softmax_row_statistics(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, first_label: int
) -> tuple[Tensor, Tensor]:
    """Maxima [2, rows] and sums [3, rows] of a student and a teacher, or [1, rows] and [2, rows] with labels [rows].

    Logits [rows, columns], fp32, are the vocabulary's slice from `first_label` on. What each row of the results is
    stands in `triton_kernels/softmax_losses.py`.
    """
    from hypenet_kernels.triton_kernels.softmax_losses import row_statistics

    assert (teacher is None) != (labels is None), "either a teacher or labels"
    rows, columns = _rows(student).shape
    maxima, sums = _statistics(student, teacher)
    if rows > 0:
        row_statistics[(rows,)](
            student, None if teacher is None else _rows(teacher), labels, maxima, sums, rows, columns, first_label,
            HAS_TEACHER=teacher is not None, BLOCK=STATISTICS_BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return maxima, sums


def _statistics(student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    count = 1 if teacher is None else 2
    return student.new_empty(count, student.shape[0]), student.new_empty(count + 1, student.shape[0])


@softmax_row_statistics.register_fake
def _(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, first_label: int
) -> tuple[Tensor, Tensor]:
    return _statistics(student, teacher)


@torch.library.custom_op("hypenet::softmax_row_gradients", mutates_args=())
def softmax_row_gradients(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    first_label: int,
    log_totals: Tensor,
    token_weights: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """token_weights[row] * (softmax(student) - softmax(teacher) or onehot(label)) [rows, columns] in `dtype`.

    log_totals [2 or 1, rows]: log of the sum of exponentials over the whole vocabulary, of student and teacher.
    """
    from hypenet_kernels.triton_kernels.softmax_losses import row_gradients

    rows, columns = _rows(student).shape
    gradient = torch.empty_like(student, dtype=dtype)
    if rows > 0:
        row_gradients[(rows, -(-columns // GRADIENT_BLOCK))](
            student, teacher, labels, token_weights.contiguous(), log_totals[0].contiguous(),
            log_totals[-1].contiguous(), gradient, columns, first_label,
            HAS_TEACHER=teacher is not None, BLOCK=GRADIENT_BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return gradient


@softmax_row_gradients.register_fake
def _(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    first_label: int,
    log_totals: Tensor,
    token_weights: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(student, dtype=dtype)
