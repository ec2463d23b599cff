"""RMSNorm over all heads and a sigmoid gate, fused. Runs between attention and the output projection.

    y = w o sigmoid(gate) / sqrt(sum_squares / channels + epsilon),   sum_squares = sum over the model's channels of o^2

Shapes: o [batch, time, heads, head_dim], contiguous; gate the same, with any batch, time and head strides; weight
[heads * head_dim]; y [batch, time, heads * head_dim]. o and gate are bf16 or fp32. Arithmetic is fp32, rounded once.

When heads are split over ranks, the caller sums `heads_sum_of_squares` over the ranks, and passes the sum and the total
number of channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypenet_kernels.arguments import check_dtypes, check_last_dimensions, check_shape, reference_dtype
from hypenet_kernels.operators import Operator
from hypenet_kernels.tiles import device_limits


def gated_norm(
    o: Tensor,
    gate: Tensor,
    weight: Tensor,
    epsilon: float,
    sum_squares: Tensor | None = None,
    channels: int | None = None,
) -> Tensor:
    """y [batch, time, heads * head_dim], contiguous, in o's dtype.

    A rank that has a part of the heads passes sum_squares fp32 [batch, time] over the `channels` channels of all ranks.
    It is an independent variable: it has its own gradient, and o's gradient holds it fixed.
    """
    _check_o(o)
    check_dtypes(gate=gate)
    check_last_dimensions(gate=gate, weight=weight)
    check_shape("gate", gate, tuple(o.shape))
    check_shape("weight", weight, (o.shape[2] * o.shape[3],))
    if sum_squares is not None:
        check_shape("sum_squares", sum_squares, tuple(o.shape[:2]))
    op = fused_gated_norm if o.is_cuda else plain_gated_norm
    return op(o, gate, weight, sum_squares, channels or weight.shape[0], epsilon)


def heads_sum_of_squares(o: Tensor) -> Tensor:
    """Sum over heads and head_dim of o^2, fp32 [batch, time]; o contiguous [batch, time, heads, head_dim]."""
    _check_o(o)
    return (fused_heads_sum_of_squares if o.is_cuda else plain_heads_sum_of_squares)(o)


def _check_o(o: Tensor) -> None:
    check_dtypes(o=o)
    if o.is_cuda and not o.is_contiguous():
        raise ValueError(
            f"o has strides {o.stride()}, but the kernels need it contiguous; pass o.contiguous()"
        )


def plain_heads_sum_of_squares(o: Tensor) -> Tensor:
    """Reference in PyTorch, differentiable by autograd. fp64 for fp64 inputs, else fp32."""
    return o.to(reference_dtype(o)).square().sum((-2, -1))


def plain_gated_norm(
    o: Tensor, gate: Tensor, weight: Tensor, sum_squares: Tensor | None, channels: int, epsilon: float
) -> Tensor:
    """Reference in PyTorch, differentiable by autograd. Computes in fp64 for fp64 inputs, else in fp32."""
    if sum_squares is None:
        sum_squares = plain_heads_sum_of_squares(o)
    dtype = reference_dtype(o)
    scale = torch.rsqrt(sum_squares.to(dtype) / channels + epsilon)[..., None, None]
    y = weight.to(dtype).view(o.shape[-2:]) * (o.to(dtype) * scale) * gate.to(dtype).sigmoid()
    return y.flatten(-2).to(o.dtype)


def _constants(o: Tensor) -> dict[str, Any]:
    """Channels of one token, and enough warps that a thread holds at most 16 of them (up to 8192 channels)."""
    channels = o.shape[2] * o.shape[3]
    block = 1 << (channels - 1).bit_length()
    return {"CHANNELS": channels, "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def _forward(
    o: Tensor, gate: Tensor, weight: Tensor, sum_squares: Tensor | None, channels: int, epsilon: float
) -> Tensor:
    from hypenet_kernels.triton_kernels.gated_norm import gated_norm_forward

    batch, time, heads, head_dim = o.shape
    y = torch.empty(batch, time, heads * head_dim, dtype=o.dtype, device=o.device)
    if o.numel() > 0:
        gated_norm_forward[(batch * time,)](
            o, gate, weight, None if sum_squares is None else sum_squares.contiguous(), y,
            *gate.stride()[:3], time, channels, epsilon,
            D=head_dim, HAS_SUM=sum_squares is not None, **_constants(o),
        )  # fmt: skip
    return y


def _backward(
    dy: Tensor,
    o: Tensor,
    gate: Tensor,
    weight: Tensor,
    sum_squares: Tensor | None,
    channels: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """do, dgate, dweight, and d_sum_squares, which is empty without sum_squares."""
    from hypenet_kernels.triton_kernels.gated_norm import gated_norm_backward

    batch, time, heads, head_dim = o.shape
    constants = _constants(o)
    # As many programs as run at once. 16 warps fill a multiprocessor, because a thread uses about 128 registers.
    programs = min(batch * time, device_limits(o.device).multiprocessors * (16 // constants["num_warps"]))
    do = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    dgate = torch.empty(o.shape, dtype=gate.dtype, device=o.device)
    sum_shape = (0,) if sum_squares is None else sum_squares.shape
    d_sum_squares = torch.empty(sum_shape, dtype=torch.float32, device=o.device)
    partial_dweight = torch.empty(programs, heads * head_dim, dtype=torch.float32, device=o.device)
    if o.numel() > 0:
        gated_norm_backward[(programs,)](
            dy.contiguous(), o, gate, weight, None if sum_squares is None else sum_squares.contiguous(),
            do, dgate, d_sum_squares, partial_dweight,
            *gate.stride()[:3], batch * time, time, channels, epsilon,
            D=head_dim, HAS_SUM=sum_squares is not None, STAGES=2, **constants,
        )  # fmt: skip
    return do, dgate, partial_dweight.sum(0).to(weight.dtype), d_sum_squares


def _backward_shapes(
    dy: Tensor, o: Tensor, gate: Tensor, weight: Tensor, sum_squares: Tensor | None, *_: object
) -> tuple[Tensor, ...]:
    d_sum_squares = o.new_empty(0 if sum_squares is None else sum_squares.shape, dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (o, gate, weight)), d_sum_squares


def _sum_of_squares(o: Tensor) -> Tensor:
    from hypenet_kernels.triton_kernels.gated_norm import sum_of_squares_forward

    sum_squares = torch.empty(o.shape[:2], dtype=torch.float32, device=o.device)
    if o.numel() > 0:
        sum_of_squares_forward[(sum_squares.numel(),)](o, sum_squares, **_constants(o))
    return sum_squares


def _sum_of_squares_backward(d_sum_squares: Tensor, o: Tensor) -> Tensor:
    from hypenet_kernels.triton_kernels.gated_norm import sum_of_squares_backward

    do = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    if o.numel() > 0:
        sum_of_squares_backward[(d_sum_squares.numel(),)](d_sum_squares.contiguous(), o, do, **_constants(o))
    return do


fused_gated_norm = Operator(
    "gated_norm",
    _forward,
    lambda o, *_: o.new_empty(*o.shape[:2], o.shape[2] * o.shape[3]),
    backward=Operator("gated_norm_backward", _backward, _backward_shapes),
    tensors=4,
)
fused_heads_sum_of_squares = Operator(
    "heads_sum_of_squares",
    _sum_of_squares,
    lambda o: o.new_empty(o.shape[:2], dtype=torch.float32),
    backward=Operator(
        "heads_sum_of_squares_backward", _sum_of_squares_backward, lambda _, o: o.new_empty(o.shape)
    ),
    tensors=1,
)
