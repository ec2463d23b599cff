# mypy: allow-untyped-defs, allow-incomplete-defs
"""RMSNorm over head_dim and rotary embedding in one pass over queries or keys; and its gradient.

    n_j = w_j x_j / rms(x),   out_1 = n_1 cos - n_2 sin,   out_2 = n_2 cos + n_1 sin   (1, 2: halves of head_dim)

A program works on a tile of ROWS rows of HALF + HALF columns: HEADS_PER_TILE heads (a divisor of the number of heads)
of ROWS / HEADS_PER_TILE consecutive tokens. Neighbouring rows share a token, so its cos and sin come from the cache.
The two halves are separate tiles, because rotation pairs column j of one with column j of the other.
"""

import triton
import triton.language as tl


@triton.jit
def _halves(pointer, columns, mask, HALF: tl.constexpr):
    """Both halves of the rows at `pointer` [ROWS, 1], in fp32; masked elements are zero."""
    first = tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointer + columns + HALF, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(pointer, columns, first, second, mask, HALF: tl.constexpr):
    tl.store(pointer + columns, first.to(pointer.dtype.element_ty), mask=mask)
    tl.store(pointer + columns + HALF, second.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _reciprocal_rms(x1, x2, epsilon, HALF: tl.constexpr):
    """1 / rms of every row, [ROWS, 1]."""
    return tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + epsilon)[:, None]


@triton.jit
def _rows(tile, tokens, ROWS: tl.constexpr, HEADS_PER_TILE: tl.constexpr):
    """Token and head of every row of a tile, and whether the token exists; each [ROWS, 1]."""
    row = tl.arange(0, ROWS)[:, None]
    token = tile * (ROWS // HEADS_PER_TILE) + row // HEADS_PER_TILE
    head = tl.program_id(1) * HEADS_PER_TILE + row % HEADS_PER_TILE
    return token, head, token < tokens


@triton.jit
def _offset(token, head, time, x_batch, x_time, x_head):
    """Offset of row (token, head) in a tensor with these strides, in int64 because it may exceed 2^31 elements."""
    batch = (token // time).to(tl.int64)
    return batch * x_batch + (token % time).to(tl.int64) * x_time + head.to(tl.int64) * x_head


@triton.jit
def norm_rope_forward(
    x, weight, cos, sin, out,
    x_batch, x_time, x_head, cos_time, sin_time, tokens, time, epsilon,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, HEADS_PER_TILE: tl.constexpr,
    HAS_ROPE: tl.constexpr,
):  # fmt: skip
    """out = rope(rms_norm(x)), contiguous; grid (ceil(tokens * HEADS_PER_TILE / ROWS), HEADS / HEADS_PER_TILE)."""
    columns = tl.arange(0, HALF)[None, :]
    token, head, mask = _rows(tl.program_id(0), tokens, ROWS, HEADS_PER_TILE)
    x1, x2 = _halves(x + _offset(token, head, time, x_batch, x_time, x_head), columns, mask, HALF)
    scale = _reciprocal_rms(x1, x2, epsilon, HALF)
    w1, w2 = _halves(weight, columns, columns < HALF, HALF)
    n1 = x1 * scale * w1
    n2 = x2 * scale * w2
    row = out + (token.to(tl.int64) * HEADS + head) * (2 * HALF)
    if HAS_ROPE:
        position = (token % time).to(tl.int64)
        c = tl.load(cos + position * cos_time + columns, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + position * sin_time + columns, mask=mask, other=0.0).to(tl.float32)
        _store_halves(row, columns, n1 * c - n2 * s, n2 * c + n1 * s, mask, HALF)
    else:
        _store_halves(row, columns, n1, n2, mask, HALF)


@triton.jit
def norm_rope_backward(
    dout, x, weight, cos, sin, dx, partial_dweight,
    dout_batch, dout_time, dout_head, x_batch, x_time, x_head, cos_time, sin_time, tokens, time, epsilon,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, HEADS_PER_TILE: tl.constexpr,
    HAS_ROPE: tl.constexpr,
):  # fmt: skip
    """dx, contiguous, and the sum of dweight over a program's tiles; grid (programs, HEADS / HEADS_PER_TILE).

    Programs loop over tiles to keep partial_dweight [programs * HEADS / HEADS_PER_TILE, 2 HALF], fp32, small.
    """
    columns = tl.arange(0, HALF)[None, :]
    w1, w2 = _halves(weight, columns, columns < HALF, HALF)
    # Reduced over rows once, at the end: this reduction crosses warps.
    dw1 = tl.zeros([ROWS, HALF], dtype=tl.float32)
    dw2 = tl.zeros([ROWS, HALF], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, ROWS // HEADS_PER_TILE), tl.num_programs(0)):
        token, head, mask = _rows(tile, tokens, ROWS, HEADS_PER_TILE)
        x1, x2 = _halves(x + _offset(token, head, time, x_batch, x_time, x_head), columns, mask, HALF)
        d1, d2 = _halves(
            dout + _offset(token, head, time, dout_batch, dout_time, dout_head), columns, mask, HALF
        )
        if HAS_ROPE:
            position = (token % time).to(tl.int64)
            c = tl.load(cos + position * cos_time + columns, mask=mask, other=0.0).to(tl.float32)
            s = tl.load(sin + position * sin_time + columns, mask=mask, other=0.0).to(tl.float32)
            dn1 = d1 * c + d2 * s
            dn2 = d2 * c - d1 * s
        else:
            dn1 = d1
            dn2 = d2
        scale = _reciprocal_rms(x1, x2, epsilon, HALF)
        x1 *= scale
        x2 *= scale
        dw1 += dn1 * x1
        dw2 += dn2 * x2
        dn1 *= w1
        dn2 *= w2
        along = (tl.sum(dn1 * x1 + dn2 * x2, axis=1) / (2 * HALF))[:, None]
        row = dx + (token.to(tl.int64) * HEADS + head) * (2 * HALF)
        _store_halves(row, columns, scale * (dn1 - x1 * along), scale * (dn2 - x2 * along), mask, HALF)
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    share = partial_dweight + program * (2 * HALF) + tl.arange(0, HALF)
    tl.store(share, tl.sum(dw1, axis=0))
    tl.store(share + HALF, tl.sum(dw2, axis=0))
