"""RMSNorm over all heads and a sigmoid gate, fused: what comes between attention and the output projection.

    y = w o sigmoid(gate) / sqrt(sum_squares / channels + epsilon),   sum_squares = sum over the model's channels of o^2

Shapes: o [batch, time, heads, head_dim], contiguous; gate the same, with any batch, time and head strides; weight
[heads * head_dim]; y [batch, time, heads * head_dim]. o and gate are bf16 or fp32, arithmetic is fp32, rounded once.

When heads are split over ranks, the caller sums `heads_sum_of_squares` over them and passes the sum, with the number of
channels of all ranks, to `gated_norm_with_sum`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypenet_kernels.operators import Operator
from hypenet_kernels.query_key_norm import check_dtypes, check_last_dimensions, check_shape
from hypenet_kernels.tiles import device_limits


def gated_norm(o: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """y [batch, time, heads * head_dim], contiguous, in o's dtype, when this rank has all heads."""
    _check(o, gate, weight)
    op = fused_gated_norm if o.is_cuda else _plain
    return op(o, gate, weight, None, weight.shape[0], epsilon)


def heads_sum_of_squares(o: Tensor) -> Tensor:
    """Sum over heads and head_dim of o^2, fp32 [batch, time]; o contiguous [batch, time, heads, head_dim]."""
    _check_o(o)
    return (fused_heads_sum_of_squares if o.is_cuda else plain_heads_sum_of_squares)(o)


def gated_norm_with_sum(
    o: Tensor, gate: Tensor, weight: Tensor, sum_squares: Tensor, channels: int, epsilon: float
) -> Tensor:
    """y for this rank's heads, given sum_squares fp32 [batch, time] over `channels` channels of all ranks.

    sum_squares is a variable of its own: o's gradient is at a fixed sum, and the sum has its own gradient.
    """
    _check(o, gate, weight)
    check_shape("sum_squares", sum_squares, tuple(o.shape[:2]))
    op = fused_gated_norm if o.is_cuda else _plain
    return op(o, gate, weight, sum_squares, channels, epsilon)


def _check_o(o: Tensor) -> None:
    check_dtypes(o=o)
    if o.is_cuda and not o.is_contiguous():
        raise ValueError(f"o has strides {o.stride()}, the kernels need it contiguous; pass o.contiguous()")


def _check(o: Tensor, gate: Tensor, weight: Tensor) -> None:
    _check_o(o)
    check_dtypes(gate=gate)
    check_last_dimensions(gate=gate, weight=weight)
    check_shape("gate", gate, tuple(o.shape))
    check_shape("weight", weight, (o.shape[2] * o.shape[3],))


def plain_gated_norm(o: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The definition, differentiable by autograd; computes in fp64 when o is fp64, else in fp32."""
    return plain_gated_norm_with_sum(o, gate, weight, plain_heads_sum_of_squares(o), weight.shape[0], epsilon)


def plain_heads_sum_of_squares(o: Tensor) -> Tensor:
    """The definition, differentiable by autograd; fp64 when o is fp64, else fp32."""
    return o.to(_wide(o)).square().sum((-2, -1))


def plain_gated_norm_with_sum(
    o: Tensor, gate: Tensor, weight: Tensor, sum_squares: Tensor, channels: int, epsilon: float
) -> Tensor:
    """The definition, differentiable by autograd; computes in fp64 when o is fp64, else in fp32."""
    dtype = _wide(o)
    scale = torch.rsqrt(sum_squares.to(dtype) / channels + epsilon)[..., None, None]
    y = weight.to(dtype).view(o.shape[-2:]) * (o.to(dtype) * scale) * gate.to(dtype).sigmoid()
    return y.flatten(-2).to(o.dtype)


def _plain(
    o: Tensor, gate: Tensor, weight: Tensor, sum_squares: Tensor | None, channels: int, epsilon: float
) -> Tensor:
    """The plain references behind the operator's signature."""
    if sum_squares is None:
        sum_squares = plain_heads_sum_of_squares(o)
    return plain_gated_norm_with_sum(o, gate, weight, sum_squares, channels, epsilon)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(o: Tensor) -> dict[str, Any]:
    """Channels of one token, and warps such that a thread holds at most 16 of them (up to 8192 channels)."""
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
            D=head_dim, HAS_SUM=sum_squares is not None, **_blocks(o),
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
    blocks = _blocks(o)
    # As many programs as run at once: 16 warps fill a multiprocessor, for they use about 128 registers per thread.
    programs = min(batch * time, device_limits(o.device).multiprocessors * (16 // blocks["num_warps"]))
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
            D=head_dim, HAS_SUM=sum_squares is not None, STAGES=2, **blocks,
        )  # fmt: skip
    return do, dgate, partial_dweight.sum(0).to(weight.dtype), d_sum_squares


def _sum_of_squares(o: Tensor) -> Tensor:
    from hypenet_kernels.triton_kernels.gated_norm import sum_of_squares_forward

    sum_squares = torch.empty(o.shape[:2], dtype=torch.float32, device=o.device)
    if o.numel() > 0:
        sum_of_squares_forward[(sum_squares.numel(),)](o, sum_squares, **_blocks(o))
    return sum_squares


def _sum_of_squares_backward(d_sum_squares: Tensor, o: Tensor) -> Tensor:
    from hypenet_kernels.triton_kernels.gated_norm import sum_of_squares_backward

    do = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    if o.numel() > 0:
        sum_of_squares_backward[(d_sum_squares.numel(),)](d_sum_squares.contiguous(), o, do, **_blocks(o))
    return do


def _forward_shapes(
    o: Tensor, gate: Tensor, weight: Tensor, sum_squares: Tensor | None, channels: int, epsilon: float
) -> Tensor:
    batch, time, heads, head_dim = o.shape
    return o.new_empty(batch, time, heads * head_dim)


def _backward_shapes(
    dy: Tensor,
    o: Tensor,
    gate: Tensor,
    weight: Tensor,
    sum_squares: Tensor | None,
    channels: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_sum_squares = o.new_empty(0 if sum_squares is None else sum_squares.shape, dtype=torch.float32)
    return o.new_empty(o.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape), d_sum_squares


def _sum_of_squares_shapes(o: Tensor) -> Tensor:
    return o.new_empty(o.shape[:2], dtype=torch.float32)


def _sum_of_squares_backward_shapes(d_sum_squares: Tensor, o: Tensor) -> Tensor:
    return o.new_empty(o.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.channels, ctx.epsilon = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    o, gate, weight, sum_squares = ctx.saved_tensors  # once: checkpointing refuses a second look
    *gradients, d_sum_squares = _fused_backward(dy, o, gate, weight, sum_squares, ctx.channels, ctx.epsilon)
    return *gradients, None if sum_squares is None else d_sum_squares, None, None


def _keep_o(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sum_gradient(ctx: Any, d_sum_squares: Tensor) -> Tensor:
    return _fused_sum_backward(d_sum_squares, *ctx.saved_tensors)


fused_gated_norm = Operator("gated_norm", _forward, _forward_shapes)
_fused_backward = Operator("gated_norm_backward", _backward, _backward_shapes)
fused_gated_norm.register_gradients(_keep_inputs, _gradients)
fused_heads_sum_of_squares = Operator("heads_sum_of_squares", _sum_of_squares, _sum_of_squares_shapes)
_fused_sum_backward = Operator(
    "heads_sum_of_squares_backward", _sum_of_squares_backward, _sum_of_squares_backward_shapes
)
fused_heads_sum_of_squares.register_gradients(_keep_o, _sum_gradient)
