"""One decoding step of Lightning Attention for a batch of sequences.

The states of the sequences lie in slots of a pool and are updated in place. Nothing waits for the device, so a step can
be captured in a CUDA graph.

Shapes: q, k, v, out [batch, heads, head_dim]; state fp32 [slots, heads, head_dim (of k), head_dim (of v)]; slots int
[batch], the slot of each sequence. A negative slot marks an unused row of the batch, whose output is 0. The sequences
of one call have different slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypenet_kernels.arguments import check_dtypes, check_last_dimensions, check_shape, check_slopes
from hypenet_kernels.operators import Operator
from hypenet_kernels.segments import log2_gammas

WINDOW = 16
_FEW_STATES = 64  # fewer states are cut into many small blocks, to fill the chip


@dataclass(frozen=True)
class _Block:
    """How one block works, chosen by measurement: columns of the state and, deferred, rows at a time and prefetch."""

    columns: int
    warps: int
    rows: int = 128
    stages: int = 1


# For few and for many states.
IN_PLACE_BLOCKS = _Block(8, 1), _Block(32, 8)
DEFERRED_BLOCKS = _Block(16, 4), _Block(64, 2, rows=32, stages=2)


def _in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slots: Tensor,
    slopes: Sequence[float],
    scale: float,
    out: Tensor,
) -> None:
    from hypenet_kernels.triton_kernels.decode import decode_in_place

    batch, heads, head_dim = q.shape
    block = IN_PLACE_BLOCKS[batch * heads >= _FEW_STATES]
    columns = min(block.columns, head_dim)
    decode_in_place[(head_dim // columns, batch * heads)](
        q, k, v, state, slots, out, log2_gammas(tuple(slopes), q.device), scale, heads,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], D=head_dim, BV=columns, num_warps=block.warps,
    )  # fmt: skip


def _deferred(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    slots: Tensor,
    pending: Tensor,
    slopes: Sequence[float],
    scale: float,
    out: Tensor,
) -> None:
    from hypenet_kernels.triton_kernels.decode import decode_deferred

    batch, heads, head_dim = q.shape
    block = DEFERRED_BLOCKS[batch * heads >= _FEW_STATES]
    columns = min(block.columns, head_dim)
    decode_deferred[(head_dim // columns, batch * heads)](
        q, k, v, state, key_window, value_window, slots, pending, out, log2_gammas(tuple(slopes), q.device), scale,
        heads, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        D=head_dim, BV=columns, BD=min(block.rows, head_dim), STAGES=block.stages, WINDOW=WINDOW, num_warps=block.warps,
    )  # fmt: skip


_fused = Operator("lightning_decode", _in_place, lambda *_: None, mutates=("state", "out"))
_fused_deferred = Operator(
    "lightning_decode_deferred",
    _deferred,
    lambda *_: None,
    mutates=("state", "key_window", "value_window", "out"),
)


def plain_lightning_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slots: Tensor,
    slopes: Sequence[float],
    scale: float,
    out: Tensor,
) -> None:
    """Reference in PyTorch, in any dtype: S <- gamma S + k^T v, out = scale q S for every sequence with a slot."""
    used = slots >= 0
    at = slots[used].long()
    gamma = torch.exp(-torch.tensor(slopes, dtype=state.dtype, device=q.device))[:, None, None]
    q_rows, k_rows, v_rows = (x[used].to(state.dtype) for x in (q, k, v))
    state[at] = gamma * state[at] + k_rows[..., :, None] * v_rows[..., None, :]
    out.zero_()
    out[used] = (scale * torch.einsum("bhk,bhkv->bhv", q_rows, state[at])).to(out.dtype)


def plain_lightning_decode_deferred(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    slots: Tensor,
    pending: Tensor,
    slopes: Sequence[float],
    scale: float,
    out: Tensor,
) -> None:
    """Reference in PyTorch: replays the pending tokens on a copy of the state, stored when the window is full."""
    out.zero_()
    for row in range(len(q)):
        slot, count = int(slots[row]), int(pending[row])
        if slot < 0:
            continue
        now = slice(row, row + 1)
        lagging = state[slot : slot + 1].clone()
        first = slots.new_zeros(1)
        for j in range(count):
            old_k, old_v = key_window[slot, None, :, j], value_window[slot, None, :, j]
            plain_lightning_decode(q[now], old_k, old_v, lagging, first, slopes, scale, out[now])
        plain_lightning_decode(q[now], k[now], v[now], lagging, first, slopes, scale, out[now])
        if count == WINDOW - 1:
            state[slot] = lagging[0]
        else:
            key_window[slot, :, count], value_window[slot, :, count] = k[row], v[row]


def lightning_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slots: Tensor,
    slopes: Sequence[float],
    scale: float,
    out: Tensor,
) -> None:
    """Decode one token per sequence. Updates `state` in place and writes `out`. ValueError for shapes that differ."""
    _check(q, k, v, state, out, slopes)
    (_fused if q.is_cuda else plain_lightning_decode)(q, k, v, state, slots, slopes, scale, out)


def lightning_decode_deferred(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    slots: Tensor,
    pending: Tensor,
    slopes: Sequence[float],
    scale: float,
    out: Tensor,
) -> None:
    """As `lightning_decode`, but writes the state only every WINDOW steps, which halves the memory traffic.

    key_window, value_window [slots, heads, WINDOW, head_dim] in k's dtype hold the tokens that the state lacks.
    `pending` int [batch] is their number: 0 after a prefill, then the caller counts up modulo WINDOW.
    """
    _check(q, k, v, state, out, slopes)
    expected = (state.shape[0], q.shape[1], WINDOW, q.shape[2])
    for window in (key_window, value_window):
        if window.shape != expected or window.dtype != k.dtype or not window.is_contiguous():
            raise ValueError(f"key_window and value_window must be contiguous {k.dtype} {list(expected)}")
    step = _fused_deferred if q.is_cuda else plain_lightning_decode_deferred
    step(q, k, v, state, key_window, value_window, slots, pending, slopes, scale, out)


def _check(q: Tensor, k: Tensor, v: Tensor, state: Tensor, out: Tensor, slopes: Sequence[float]) -> None:
    _batch, heads, head_dim = q.shape
    check_dtypes(q=q)
    check_last_dimensions(q=q, k=k, v=v)
    for name, x in {"k": k, "v": v, "out": out}.items():
        check_shape(name, x, tuple(q.shape))
    check_slopes(slopes, heads)
    shape = (len(state), heads, head_dim, head_dim)
    if state.shape != shape or state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(
            f"state must be contiguous float32 [slots, {heads}, {head_dim}, {head_dim}], got {state.dtype} "
            f"{tuple(state.shape)}"
        )
    if not out.is_contiguous():
        raise ValueError("out must be contiguous; call .contiguous()")
