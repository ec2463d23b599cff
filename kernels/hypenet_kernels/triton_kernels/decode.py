"""One decoding step of Lightning Attention per sequence. Reading and writing the states takes all the time."""

import triton
import triton.language as tl


@triton.jit
def decode_in_place(
    q, k, v, state, slots, out, log2_gammas, scale, heads,
    q_batch, q_head, k_batch, k_head, v_batch, v_head,
    D: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """S <- gamma S + k^T v, o = scale q S; grid (D / BV, batch * heads). With a negative slot o = 0."""
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    d = tl.arange(0, D)
    e = tl.program_id(0) * BV + tl.arange(0, BV)
    # Loads that do not depend on the slot are issued before the slot is known.
    slot = tl.load(slots + row).to(tl.int64)
    gamma = tl.exp2(tl.load(log2_gammas + head))
    q_row = tl.load(q + row * q_batch + head * q_head + d).to(tl.float32) * scale
    k_row = tl.load(k + row * k_batch + head * k_head + d).to(tl.float32)
    v_row = tl.load(v + row * v_batch + head * v_head + e).to(tl.float32)
    used = slot >= 0
    at = state + (tl.maximum(slot, 0) * heads + head) * D * D + d[:, None] * D + e[None, :]
    s = tl.load(at, mask=used, other=0.0) * gamma + k_row[:, None] * v_row[None, :]
    tl.store(at, s, mask=used)
    result = tl.where(used, tl.sum(s * q_row[:, None], 0), 0.0)
    tl.store(out + (row * heads + head) * D + e, result.to(out.dtype.element_ty))


@triton.jit
def _pending_rows(tokens, j, n, columns, used, D: tl.constexpr):
    """Rows j < n of a window of keys or values, fp32 [WINDOW, columns]; other rows are zero."""
    mask = used & (j < n)[:, None]
    return tl.load(tokens + j[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def decode_deferred(
    q, k, v, state, keys, values, slots, pending, out, log2_gammas, scale, heads,
    q_batch, q_head, k_batch, k_head, v_batch, v_head,
    D: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """As decode_in_place, but the state lags by `pending` < WINDOW tokens, whose keys and values are kept.

    o = scale (gamma^(n + 1) q S + sum_j gamma^(n - j) (q . k_j) v_j), j = 0 .. n, n = pending. Only the step that fills
    the window writes the state, which halves the traffic. The kernel streams the state, BD rows at a time, STAGES
    ahead: a whole state would fill the registers, and fewer blocks would load at once.
    """
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    d = tl.arange(0, D)
    part = tl.arange(0, BD)
    e = tl.program_id(0) * BV + tl.arange(0, BV)
    j = tl.arange(0, WINDOW)
    # Loads that do not depend on the slot are issued before the slot is known.
    slot = tl.load(slots + row).to(tl.int64)
    n = tl.load(pending + row)
    log2_gamma = tl.load(log2_gammas + head)
    q += row * q_batch + head * q_head
    k += row * k_batch + head * k_head
    q_row = tl.load(q + d).to(tl.float32) * scale
    k_now = tl.load(k + d)
    v_now = tl.load(v + row * v_batch + head * v_head + e)
    v_row = v_now.to(tl.float32)
    used = slot >= 0
    place = tl.maximum(slot, 0) * heads + head
    at = state + place * D * D + part[:, None] * D + e[None, :]
    keys += place * WINDOW * D
    values += place * WINDOW * D
    # This step's token is read from k and v, because another block may not have written it to the window yet.
    weights = tl.sum(_pending_rows(keys, j, n, d, used, D) * q_row[None, :], 1)
    weights *= tl.exp2(log2_gamma * tl.maximum(n - j, 0))
    result = tl.sum(_pending_rows(values, j, n, e, used, D) * weights[:, None], 0)
    result += v_row * tl.sum(k_now.to(tl.float32) * q_row)
    seen = tl.zeros([BD, BV], tl.float32)
    if n == WINDOW - 1:
        for first in tl.range(0, D, BD):
            s = tl.load(at + first * D, mask=used, other=0.0)
            seen += s * tl.load(q + first + part).to(tl.float32)[:, None]
            s = (
                s * tl.exp2(log2_gamma * WINDOW)
                + tl.load(k + first + part).to(tl.float32)[:, None] * v_row[None, :]
            )
            for i in tl.static_range(WINDOW - 1):  # rank-one updates: a tile product would need more registers
                k_i = tl.load(keys + i * D + first + part, mask=used, other=0.0).to(tl.float32)
                v_i = tl.load(values + i * D + e, mask=used, other=0.0).to(tl.float32)
                s += (k_i * tl.exp2(log2_gamma * (WINDOW - 1 - i)))[:, None] * v_i[None, :]
            tl.store(at + first * D, s, mask=used)
    else:
        for first in tl.range(0, D, BD, num_stages=STAGES):
            # The pool is larger than the cache. The state would evict the window, which every block reads.
            s = tl.load(at + first * D, mask=used, other=0.0, eviction_policy="evict_first")
            seen += s * tl.load(q + first + part).to(tl.float32)[:, None]
        tl.store(keys + n * D + d, k_now, mask=used & (tl.program_id(0) == 0))
        tl.store(values + n * D + e, v_now, mask=used)
    result += tl.sum(seen, 0) * (scale * tl.exp2(log2_gamma * (n + 1)))
    tl.store(out + (row * heads + head) * D + e, tl.where(used, result, 0.0).to(out.dtype.element_ty))
