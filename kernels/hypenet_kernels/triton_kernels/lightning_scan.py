"""The one kernel behind Lightning Attention, forward and backward.

    scan(a, b, c)_i = scale * sum over j <= i of gamma^(i - j) (a_i . b_j) c_j

The forward pass is scan(q, k, v). With do the gradient of the output, the gradients are the same sum again:

    dq = scan(do, v, k)     dk = scan(v, do, q) backwards in time     dv = scan(k, q, do) backwards in time

One body, run in two directions, therefore computes everything. It walks over a segment of a sequence in chunks of C
tokens. Within a chunk the sum is two matrix products around a decay mask. The tokens before the chunk enter through a
state S = sum_j gamma^(last - j) b_j^T c_j, [head_dim, head_dim], that stays in registers. A segment first rebuilds its
start state from the chunks before it (the halo: tokens whose weight gamma^distance is still above 2^-25). No state goes
through memory, and segments run in any order.

All decays multiply fp32 accumulators or one operand of the state update, and all are <= 1, so no slope can cause an
overflow. No transposed accumulator feeds a dot, because Triton 3.4 to 3.7.0 miscompiles that on Hopper.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(pointer, stride, rows, C: tl.constexpr, WIDTH: tl.constexpr):
    """Tile [C, WIDTH] whose row r starts at pointer + r * stride. Rows from `rows` on are zero."""
    r = tl.arange(0, C)[:, None]
    return tl.load(pointer + r * stride + tl.arange(0, WIDTH)[None, :], mask=r < rows, other=0.0)


@triton.jit
def _nearest_tf32(x):
    """Tensor cores truncate the 13 low bits of an fp32. Adding half of the truncated range turns this into rounding."""
    return (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b. PRECISION applies to fp32 only."""
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a = _nearest_tf32(a)
        b = _nearest_tf32(b)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def _add_chunk(state, b, c, rows, log2_gamma, reverse, PRECISION: tl.constexpr):
    """gamma^rows state + sum_j gamma^(distance of j to the end of the chunk in scan direction) b_j^T c_j."""
    j = tl.arange(0, b.shape[0])
    distance = tl.where(reverse, j, rows - 1 - j)
    weighted = (c * tl.exp2(log2_gamma * distance)[:, None]).to(c.dtype)
    return _dot(tl.trans(b), weighted, state * tl.exp2(log2_gamma * rows), PRECISION)


@triton.jit
def _scan(
    a, b, c, out, state_in, state_out,
    a_batch, a_time, a_head, b_batch, b_time, b_head, c_batch, c_time, c_head,
    item, log2_gammas, scale, heads, column, state_row, state_column, reverse, has_state_out,
    D: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
    HAS_STATE_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of one head: columns [column, column + BV) of scan(a, b, c). segments.py defines `item`."""
    sequence = tl.load(item).to(tl.int64)
    head = tl.load(item + 1).to(tl.int64)
    batch = tl.load(item + 2).to(tl.int64)
    start = tl.load(item + 3).to(tl.int64)
    length = tl.load(item + 4)
    begin = tl.load(item + 5)
    end = tl.load(item + 6)
    halo = tl.load(item + 7)
    log2_gamma = tl.load(log2_gammas + head)
    a += batch * a_batch + start * a_time + head * a_head
    b += batch * b_batch + start * b_time + head * b_head
    c += batch * c_batch + start * c_time + head * c_head + column
    out_time = heads * D
    # `out` is contiguous. A packed sequence has batch 0, any other has start 0 and batch = sequence.
    out += (batch * length + start) * out_time + head * D + column
    state_at = (sequence * heads + head) * D * D + column * state_column
    d = tl.arange(0, D)[:, None] * state_row + tl.arange(0, BV)[None, :] * state_column

    chunks = tl.cdiv(length, C)
    # int64, because offsets exceed 2^31 elements.
    origin = tl.where(reverse, chunks - 1, 0).to(tl.int64) * C
    stride = tl.where(reverse, -C, C)
    first = tl.maximum(begin - halo, 0)
    if HAS_STATE_IN and first == 0:
        state = tl.load(state_in + state_at + d)
        if reverse:  # a gradient of the final state: the scan applies gamma and the scale once too often
            state = state * (tl.exp2(-log2_gamma) / scale)
    else:
        state = tl.zeros([D, BV], dtype=tl.float32)
    for step in tl.range(first, begin, num_stages=STAGES):
        token = origin + step * stride
        rows = tl.minimum(C, length - token).to(tl.int32)
        b_tile = _rows(b + token * b_time, b_time, rows, C, D)
        c_tile = _rows(c + token * c_time, c_time, rows, C, BV)
        state = _add_chunk(state, b_tile, c_tile, rows, log2_gamma, reverse, PRECISION)

    r = tl.arange(0, C)
    distance = (r[:, None] - r[None, :]) * tl.where(reverse, -1, 1)
    within = tl.where(distance >= 0, tl.exp2(log2_gamma * tl.maximum(distance, 0)) * scale, 0.0)
    for step in tl.range(begin, end, num_stages=STAGES):
        token = origin + step * stride
        rows = tl.minimum(C, length - token).to(tl.int32)
        a_tile = _rows(a + token * a_time, a_time, rows, C, D)
        b_tile = _rows(b + token * b_time, b_time, rows, C, D)
        c_tile = _rows(c + token * c_time, c_time, rows, C, BV)
        from_state = tl.exp2(log2_gamma * tl.where(reverse, rows - r, r + 1)) * scale
        scores = _dot(a_tile, tl.trans(b_tile), tl.zeros([C, C], tl.float32), PRECISION) * within
        result = _dot(a_tile, state.to(a_tile.dtype), tl.zeros([C, BV], tl.float32), PRECISION)
        result = _dot(scores.to(c_tile.dtype), c_tile, result * from_state[:, None], PRECISION)
        state = _add_chunk(state, b_tile, c_tile, rows, log2_gamma, reverse, PRECISION)
        out_tile = out + token * out_time + r[:, None] * out_time + tl.arange(0, BV)[None, :]
        tl.store(out_tile, result.to(out.dtype.element_ty), mask=r[:, None] < rows)
    if has_state_out and end == chunks:
        if reverse:  # the gradient of the state before the first token
            state = state * (tl.exp2(log2_gamma) * scale)
        tl.store(state_out + state_at + d, state)


@triton.jit
def lightning_forward(
    q, k, v, o, initial_state, final_state, items,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    log2_gammas, scale, heads,
    D: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = scan(q, k, v); grid (D / BV, items)."""
    column = tl.program_id(0) * BV
    item = items + tl.program_id(1) * 8
    _scan(
        q, k, v, o, initial_state, final_state,
        q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
        item, log2_gammas, scale, heads, column, D, 1, False, HAS_FINAL,
        D, BV, C, STAGES, HAS_INITIAL, PRECISION,
    )  # fmt: skip


@triton.jit
def _select(index, zero, one, two):
    """One of three scalars. A select keeps the compiler's knowledge of alignment, an `if` loses it in Triton 3.6."""
    return tl.where(index == 0, zero, tl.where(index == 1, one, two))


@triton.jit
def lightning_backward(
    q, k, v, do, dq, dk, dv, initial_state, d_final_state, d_initial_state, items,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head, do_batch, do_time, do_head,
    log2_gammas, scale, heads,
    D: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
    HAS_STATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The three gradients, one scan each; grid (3 D / BV, items). The scan of dv ends in d_initial_state.

    A block selects the pointers of its gradient. Branches around three copies of the body would need three times the
    shared memory.
    """
    column = tl.program_id(0) // 3 * BV
    gradient = tl.program_id(0) % 3
    a = _select(gradient, k, v, do)
    b = _select(gradient, q, do, v)
    c = _select(gradient, do, q, k)
    out = _select(gradient, dv, dk, dq)
    a_batch = _select(gradient, k_batch, v_batch, do_batch)
    a_time = _select(gradient, k_time, v_time, do_time)
    a_head = _select(gradient, k_head, v_head, do_head)
    b_batch = _select(gradient, q_batch, do_batch, v_batch)
    b_time = _select(gradient, q_time, do_time, v_time)
    b_head = _select(gradient, q_head, do_head, v_head)
    c_batch = _select(gradient, do_batch, q_batch, k_batch)
    c_time = _select(gradient, do_time, q_time, k_time)
    c_head = _select(gradient, do_head, q_head, k_head)
    state_in = _select(gradient, d_final_state, d_final_state, initial_state)
    _scan(
        a, b, c, out, state_in, d_initial_state,
        a_batch, a_time, a_head, b_batch, b_time, b_head, c_batch, c_time, c_head,
        items + tl.program_id(1) * 8, log2_gammas, scale, heads, column,
        _select(gradient, D, 1, 1), _select(gradient, 1, D, D), gradient < 2, HAS_STATES and gradient == 0,
        D, BV, C, STAGES, HAS_STATES, PRECISION,
    )  # fmt: skip
