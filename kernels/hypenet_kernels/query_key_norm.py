"""RMSNorm over head_dim and rotary embedding of queries and keys, fused. Runs before attention.

    n = w x / sqrt(mean(x^2) + epsilon),   out_1 = n_1 cos - n_2 sin,   out_2 = n_2 cos + n_1 sin

1 and 2 are the halves of head_dim. Arithmetic is fp32, rounded once to the input's dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hypenet_kernels.arguments import check_dtypes, check_last_dimensions, check_shape, reference_dtype
from hypenet_kernels.operators import Operator
from hypenet_kernels.tiles import device_limits

ROWS = 16  # with 4 warps and head_dim 128 every thread loads 16 bytes of bf16 per half
PROGRAMS_PER_MULTIPROCESSOR = 8


def norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Normalised and rotated query and key, contiguous, in their own dtypes. Differentiable once.

    Args:
        query: [batch, time, query_heads, head_dim], bf16 or fp32; head_dim is a power of two. The last dimension is
            contiguous, other strides are free.
        key: [batch, time, key_heads, head_dim], likewise.
        query_weight, key_weight: [head_dim].
        cos, sin: fp32 [time, head_dim / 2], or None for no rotation.

    Raises:
        ValueError: shapes, dtypes or strides that the kernels would misread.
    """
    check_dtypes(query=query, key=key)
    check_last_dimensions(query=query, key=key, query_weight=query_weight, key_weight=key_weight)
    _, time, _, head_dim = query.shape
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise ValueError(f"norm_rope needs a head_dim that is a power of two, not {head_dim}; pad the heads")
    check_shape("query_weight", query_weight, (head_dim,))
    check_shape("key_weight", key_weight, (head_dim,))
    check_shape("key", key, (*query.shape[:2], key.shape[2], head_dim))
    if cos is not None and sin is not None:
        check_last_dimensions(cos=cos, sin=sin)
        check_shape("cos", cos, (time, head_dim // 2))
        check_shape("sin", sin, (time, head_dim // 2))
    elif cos is not None or sin is not None:
        raise ValueError("norm_rope got one of cos and sin; pass both, or None for both to skip the rotation")
    op = fused_norm_rope if query.is_cuda else plain_norm_rope
    return op(query, key, query_weight, key_weight, cos, sin, epsilon)


def plain_norm_rope(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, *rotation_and_epsilon: Any
) -> tuple[Tensor, Tensor]:
    """Reference in PyTorch, differentiable by autograd. Computes in fp64 for fp64 inputs, else in fp32."""
    return (
        _plain_one(query, query_weight, *rotation_and_epsilon),
        _plain_one(key, key_weight, *rotation_and_epsilon),
    )


def _plain_one(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, epsilon: float) -> Tensor:
    dtype = reference_dtype(x)
    wide = x.to(dtype)
    normed = weight.to(dtype) * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    if cos is not None and sin is not None:
        n1, n2 = normed.chunk(2, -1)
        c, s = (angle.to(dtype)[:, None] for angle in (cos, sin))
        normed = torch.cat([n1 * c - n2 * s, n2 * c + n1 * s], -1)
    return normed.to(x.dtype).contiguous()


def _heads_per_tile(heads: int) -> int:
    """Largest power of two that divides heads, at most ROWS, so that no row of a tile is wasted."""
    return math.gcd(heads, ROWS)


def _arguments(x: Tensor, cos: Tensor | None, sin: Tensor | None, epsilon: float) -> tuple[Any, ...]:
    """The last runtime arguments of both kernels: strides of x, cos and sin, tokens, time, epsilon."""
    rows = [0 if angle is None else angle.stride(0) for angle in (cos, sin)]
    return *x.stride()[:3], *rows, x.shape[0] * x.shape[1], x.shape[1], epsilon


def _constants(x: Tensor, cos: Tensor | None) -> dict[str, Any]:
    heads, head_dim = x.shape[2:]
    return {
        "HEADS": heads,
        "HALF": head_dim // 2,
        "ROWS": ROWS,
        "HEADS_PER_TILE": _heads_per_tile(heads),
        "HAS_ROPE": cos is not None,
        "num_warps": 4,
    }


def _tiles(x: Tensor) -> tuple[int, int]:
    """Number of tiles along tokens and along heads."""
    heads_per_tile = _heads_per_tile(x.shape[2])
    return math.ceil(x.shape[0] * x.shape[1] * heads_per_tile / ROWS), x.shape[2] // heads_per_tile


def _forward_one(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, epsilon: float) -> Tensor:
    from hypenet_kernels.triton_kernels.norm_rope import norm_rope_forward

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        norm_rope_forward[_tiles(x)](
            x, weight, cos, sin, out, *_arguments(x, cos, sin, epsilon), **_constants(x, cos)
        )
    return out


def _backward_one(
    dout: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    from hypenet_kernels.triton_kernels.norm_rope import norm_rope_backward

    dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # a gradient may arrive expanded
    token_tiles, head_tiles = _tiles(x)
    slots = device_limits(x.device).multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    programs = min(token_tiles, max(1, slots // head_tiles))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial_dweight = torch.empty(programs * head_tiles, x.shape[3], dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        norm_rope_backward[(programs, head_tiles)](
            dout, x, weight, cos, sin, dx, partial_dweight,
            *dout.stride()[:3], *_arguments(x, cos, sin, epsilon), **_constants(x, cos),
        )  # fmt: skip
    return dx, partial_dweight.sum(0).to(weight.dtype)


def _forward(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    return (
        _forward_one(query, query_weight, cos, sin, epsilon),
        _forward_one(key, key_weight, cos, sin, epsilon),
    )


def _backward(
    d_query_out: Tensor,
    d_key_out: Tensor,
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dquery, dquery_weight = _backward_one(d_query_out, query, query_weight, cos, sin, epsilon)
    dkey, dkey_weight = _backward_one(d_key_out, key, key_weight, cos, sin, epsilon)
    return dquery, dkey, dquery_weight, dkey_weight


def _shapes_of(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


fused_norm_rope = Operator(
    "norm_rope",
    _forward,
    lambda query, key, *_: _shapes_of(query, key),
    backward=Operator(
        "norm_rope_backward", _backward, lambda _dq, _dk, *inputs: _shapes_of(*inputs[:4])
    ),
    tensors=6,
)
