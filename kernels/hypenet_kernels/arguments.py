"""Checks that the operators share, and the dtype in which their plain references compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_dtypes(**tensors: Tensor) -> None:
    """ValueError unless every tensor is bf16 or fp32. The plain references on CPU also take fp64."""
    for name, x in tensors.items():
        if x.dtype in (torch.bfloat16, torch.float32) or (x.dtype == torch.float64 and not x.is_cuda):
            continue
        raise ValueError(
            f"{name} is {str(x.dtype).removeprefix('torch.')}, but the kernels take bfloat16 or float32; use bfloat16 "
            "(float16 overflows in training)"
        )


def check_last_dimensions(**tensors: Tensor) -> None:
    """ValueError unless every tensor's last dimension is contiguous: kernels load it 16 bytes at a time."""
    for name, x in tensors.items():
        if x.stride(-1) != 1:
            raise ValueError(
                f"{name} has stride {x.stride(-1)} in its last dimension, but the kernels need 1; "
                f"pass {name}.contiguous(), or slice the fused projection without transposing that dimension"
            )


def check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    """ValueError unless x has this shape: a kernel would read out of bounds."""
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {expected}; slice or reshape it")


def check_slopes(slopes: Sequence[float], heads: int) -> None:
    """ValueError unless there is one decay rate per head."""
    if len(slopes) != heads:
        raise ValueError(f"slopes has {len(slopes)} entries for {heads} heads; pass one decay rate per head")
