"""One token per sequence against a recurrent state: bound by reading and writing the states."""

import triton
import triton.language as tl


@triton.jit
def decode_in_place(
    q, k, v, state, slots, out, log2_gammas, scale, heads,
    q_batch, q_head, k_batch, k_head, v_batch, v_head,
    D: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """S <- gamma S + k^T v, o = scale q S; grid (D / BV, batch * heads). A negative slot is an empty seat: o = 0."""
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    d = tl.arange(0, D)
    e = tl.program_id(0) * BV + tl.arange(0, BV)
    # What does not depend on the slot is asked for before the slot is known.
    slot = tl.load(slots + row).to(tl.int64)
    gamma = tl.exp2(tl.load(log2_gammas + head))
    q_row = tl.load(q + row * q_batch + head * q_head + d).to(tl.float32) * scale
    k_row = tl.load(k + row * k_batch + head * k_head + d).to(tl.float32)
    v_row = tl.load(v + row * v_batch + head * v_head + e).to(tl.float32)
    seated = slot >= 0
    at = state + (tl.maximum(slot, 0) * heads + head) * D * D + d[:, None] * D + e[None, :]
    s = tl.load(at, mask=seated, other=0.0) * gamma + k_row[:, None] * v_row[None, :]
    tl.store(at, s, mask=seated)
    result = tl.where(seated, tl.sum(s * q_row[:, None], 0), 0.0)
    tl.store(out + (row * heads + head) * D + e, result.to(out.dtype.element_ty))


@triton.jit
def decode_deferred(
    q, k, v, state, keys, values, slots, pending, out, log2_gammas, scale, heads,
    q_batch, q_head, k_batch, k_head, v_batch, v_head,
    D: tl.constexpr, BV: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """As decode_in_place, but the state lags by `pending` < WINDOW tokens, which are kept as keys and values.

    o = scale (gamma^(n + 1) q S + sum_j gamma^(n - j) (q . k_j) v_j), j = 0 .. n, n = pending. The step that fills the
    window writes the state; all others only read it, which is half the traffic.
    """
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    d = tl.arange(0, D)
    e = tl.program_id(0) * BV + tl.arange(0, BV)
    j = tl.arange(0, WINDOW)
    # What does not depend on the slot is asked for before the slot is known.
    slot = tl.load(slots + row).to(tl.int64)
    n = tl.load(pending + row)
    log2_gamma = tl.load(log2_gammas + head)
    q_row = tl.load(q + row * q_batch + head * q_head + d).to(tl.float32) * scale
    k_now = tl.load(k + row * k_batch + head * k_head + d)
    v_now = tl.load(v + row * v_batch + head * v_head + e)
    seated = slot >= 0
    place = tl.maximum(slot, 0) * heads + head
    at = state + place * D * D + d[:, None] * D + e[None, :]
    keys += place * WINDOW * D
    values += place * WINDOW * D
    # The pool is larger than the cache, so the state would only push out the window that every block reads.
    s = tl.load(at, mask=seated, other=0.0, eviction_policy="evict_first")
    # This step's token comes from k and v, never from the window: another block may not have written it yet.
    past = seated & (j < n)[:, None]
    k_past = tl.load(keys + j[:, None] * D + d[None, :], mask=past, other=0.0).to(tl.float32)
    v_past = tl.load(values + j[:, None] * D + e[None, :], mask=past, other=0.0).to(tl.float32)
    decay = tl.exp2(log2_gamma * tl.maximum(n - j, 0))
    k_row = k_now.to(tl.float32)
    v_row = v_now.to(tl.float32)
    result = tl.sum(s * q_row[:, None], 0) * tl.exp2(log2_gamma * (n + 1))
    weights = tl.sum(k_past * q_row[None, :], 1) * decay
    result += tl.sum(v_past * weights[:, None], 0) + v_row * tl.sum(k_row * q_row)
    result = tl.where(seated, result, 0.0)
    if n == WINDOW - 1:
        s = s * tl.exp2(log2_gamma * WINDOW) + k_row[:, None] * v_row[None, :]
        for i in tl.static_range(
            WINDOW - 1
        ):  # rank-one updates: a product of tiles would cost every step registers
            k_i = tl.load(keys + i * D + d, mask=seated, other=0.0).to(tl.float32)
            v_i = tl.load(values + i * D + e, mask=seated, other=0.0).to(tl.float32)
            s += (k_i * tl.exp2(log2_gamma * (WINDOW - 1 - i)))[:, None] * v_i[None, :]
        tl.store(at, s, mask=seated)
    else:
        first = seated & (tl.program_id(0) == 0)
        tl.store(keys + n * D + d, k_now, mask=first)
        tl.store(values + n * D + e, v_now, mask=seated)
    tl.store(out + (row * heads + head) * D + e, result.to(out.dtype.element_ty))
