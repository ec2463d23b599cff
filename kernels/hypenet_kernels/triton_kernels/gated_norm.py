# mypy: allow-untyped-defs, allow-incomplete-defs
"""RMSNorm over all heads and a sigmoid gate, in one pass over the output of attention; and its gradient.

    y = w o r sigmoid(gate),   r = 1 / sqrt(sum_squares / channels + epsilon)

A program holds this rank's CHANNELS channels of one token in registers, padded to BLOCK, a power of two. With HAS_SUM
the sum of squares over the channels of all ranks is an input with its own gradient. Without it, the kernel computes the
sum, and its gradient is part of do.
"""

import triton
import triton.language as tl


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gate_columns(c, gate_head, D: tl.constexpr):
    """Offset of channel c within a token of the gate. Its heads need not be adjacent."""
    return (c // D).to(tl.int64) * gate_head + c % D


@triton.jit
def _gate_row(token, time, gate_batch, gate_time):
    return (token // time) * gate_batch + (token % time) * gate_time


@triton.jit
def gated_norm_forward(
    o, gate, weight, sum_squares, y,
    gate_batch, gate_time, gate_head, time, channels, epsilon,
    CHANNELS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, HAS_SUM: tl.constexpr,
):  # fmt: skip
    """y, contiguous like o; grid (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < CHANNELS
    gate += _gate_row(token, time, gate_batch, gate_time)
    x = _load(o + token * CHANNELS + c, mask)
    g = _load(gate + _gate_columns(c, gate_head, D), mask)
    w = _load(weight + c, mask)
    total = tl.load(sum_squares + token) if HAS_SUM else tl.sum(x * x, axis=0)
    r = tl.rsqrt(total / channels + epsilon)
    tl.store(y + token * CHANNELS + c, (w * (x * r) * tl.sigmoid(g)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def gated_norm_backward(
    dy, o, gate, weight, sum_squares, do, dgate, d_sum_squares, partial_dweight,
    gate_batch, gate_time, gate_head, tokens, time, channels, epsilon,
    CHANNELS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, HAS_SUM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """do and dgate, contiguous like o; d_sum_squares [tokens] if HAS_SUM; the sum of dweight over a program's tokens.

    Grid (programs,). Programs loop over tokens to keep partial_dweight [programs, CHANNELS], fp32, small.
    """
    first = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    c = tl.arange(0, BLOCK)
    mask = c < CHANNELS
    gate_columns = _gate_columns(c, gate_head, D)
    w = _load(weight + c, mask)
    dw = tl.zeros([BLOCK], dtype=tl.float32)
    for step in tl.range(0, tl.cdiv(tokens - tl.program_id(0), programs), num_stages=STAGES):
        token = first + step * programs
        row = token * CHANNELS
        x = _load(o + row + c, mask)
        g = tl.sigmoid(_load(gate + _gate_row(token, time, gate_batch, gate_time) + gate_columns, mask))
        d = _load(dy + row + c, mask)
        total = tl.load(sum_squares + token) if HAS_SUM else tl.sum(x * x, axis=0)
        r = tl.rsqrt(total / channels + epsilon)
        n = x * r
        dng = d * n * g
        dw += dng
        tl.store(dgate + row + c, (dng * w * (1.0 - g)).to(dgate.dtype.element_ty), mask=mask)
        # Gradient of the norm: dn = d w g, and r depends on o only through the sum of squares.
        along = tl.sum(dng * w, axis=0) / channels
        dn = d * w * g
        if HAS_SUM:
            tl.store(d_sum_squares + token, -0.5 * along * r * r)
        else:
            dn -= n * along
        tl.store(do + row + c, (dn * r).to(do.dtype.element_ty), mask=mask)
    tl.store(partial_dweight + first * CHANNELS + c, dw, mask=mask)


@triton.jit
def sum_of_squares_forward(o, sum_squares, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """sum_squares [tokens], fp32; grid (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    x = _load(o + token * CHANNELS + c, c < CHANNELS)
    tl.store(sum_squares + token, tl.sum(x * x, axis=0))


@triton.jit
def sum_of_squares_backward(d_sum_squares, o, do, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """do = 2 o d_sum_squares; grid (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < CHANNELS
    x = _load(o + token * CHANNELS + c, mask)
    scale = 2.0 * tl.load(d_sum_squares + token)
    tl.store(do + token * CHANNELS + c, (x * scale).to(do.dtype.element_ty), mask=mask)
