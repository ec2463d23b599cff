"""Losses and gradients of rows of logits, by the kernels of `triton_kernels/softmax_losses.py`.

Each of the two operators reads the logits once, and has a reference in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypenet_kernels.operators import Operator

STATISTICS_BLOCK, GRADIENT_BLOCK = 4096, 2048
WARPS = 8


def _checked(logits: Tensor) -> Tensor:
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(
            f"logits must be contiguous float32, not {logits.dtype} with strides {logits.stride()}; convert them"
        )
    return logits


def _statistics_of(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, first_label: int
) -> tuple[Tensor, Tensor]:
    """Maxima [2, rows] and sums [3, rows] of student and teacher, or [1, rows] and [2, rows] with labels [rows].

    Logits are fp32 [rows, columns], the slice of the vocabulary that starts at `first_label`.
    `triton_kernels/softmax_losses.py` defines each row of the results.
    """
    from hypenet_kernels.triton_kernels.softmax_losses import row_statistics

    assert (teacher is None) != (labels is None), "pass either a teacher or labels"
    rows, columns = _checked(student).shape
    maxima, sums = _statistics_shapes(student, teacher)
    if rows > 0:
        row_statistics[(rows,)](
            student, None if teacher is None else _checked(teacher), labels, maxima, sums, rows, columns, first_label,
            HAS_TEACHER=teacher is not None, BLOCK=STATISTICS_BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return maxima, sums


def _statistics_shapes(student: Tensor, teacher: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    count = 1 if teacher is None else 2
    return student.new_empty(count, student.shape[0]), student.new_empty(count + 1, student.shape[0])


def _gradients_of(
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

    rows, columns = _checked(student).shape
    gradient = torch.empty_like(student, dtype=dtype)
    if rows > 0:
        row_gradients[(rows, -(-columns // GRADIENT_BLOCK))](
            student, teacher, labels, token_weights.contiguous(), log_totals[0].contiguous(),
            log_totals[-1].contiguous(), gradient, columns, first_label,
            HAS_TEACHER=teacher is not None, BLOCK=GRADIENT_BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return gradient


softmax_row_statistics = Operator("softmax_row_statistics", _statistics_of, _statistics_shapes)
softmax_row_gradients = Operator(
    "softmax_row_gradients",
    _gradients_of,
    lambda student, *others: torch.empty_like(student, dtype=others[-1]),
)


def plain_row_statistics(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, first_label: int
) -> tuple[Tensor, Tensor]:
    """Reference of `softmax_row_statistics` in PyTorch."""
    maximum = student.amax(-1)
    total = (student - maximum[:, None]).exp_().sum(-1)
    if teacher is None:
        assert labels is not None
        local, mine = _local_labels(student, labels, first_label)
        return maximum[None], torch.stack([total, student.gather(-1, local)[:, 0] * mine])
    teacher_maximum = teacher.amax(-1)
    exponential = (teacher - teacher_maximum[:, None]).exp_()
    teacher_total = exponential.sum(-1)
    cross = exponential.mul_(teacher - student).sum(-1)
    return torch.stack([maximum, teacher_maximum]), torch.stack([total, teacher_total, cross])


def plain_row_gradients(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    first_label: int,
    log_totals: Tensor,
    token_weights: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Reference of `softmax_row_gradients` in PyTorch."""
    difference = (student - log_totals[0][:, None]).exp_()
    if teacher is not None:
        difference -= (teacher - log_totals[1][:, None]).exp_()
    elif labels is not None:
        local, mine = _local_labels(student, labels, first_label)
        difference.scatter_add_(-1, local, -mine.float()[:, None])
    return difference.mul_(token_weights[:, None]).to(dtype)


def _local_labels(logits: Tensor, labels: Tensor, first_label: int) -> tuple[Tensor, Tensor]:
    """Columns of the labels [rows, 1], clamped to this slice, and whether each label is in it [rows]."""
    local = labels - first_label
    mine = (local >= 0) & (local < logits.shape[-1])
    return local.clamp(0, logits.shape[-1] - 1)[:, None], mine
