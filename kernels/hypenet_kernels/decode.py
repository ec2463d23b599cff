"""One decoding step of Lightning Attention for a batch of sequences whose states live in slots of a pool.

Everything is in place and nothing waits for the device, so a step can be captured in a CUDA graph.

Shapes: q, k, v, out [batch, heads, head_dim]; state fp32 [slots, heads, head_dim (of k), head_dim (of v)]; slots int
[batch], the slot of each sequence, negative for an empty seat (its output is 0). All sequences of one call have
different slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypenet_kernels.segments import log2_gammas

WINDOW = 16
_FEW = 64  # states; fewer are cut into many small blocks, to fill the chip


@dataclass(frozen=True)
class _Block:
    """How one block works (measured): columns of the state; deferred, also rows at a time and how far ahead."""

    columns: int
    warps: int
    rows: int = 128
    stages: int = 1


_IN_PLACE = _Block(8, 1), _Block(32, 8)
_DEFERRED = _Block(16, 4), _Block(64, 2, rows=32, stages=2)


def _block(blocks: tuple[_Block, _Block], states: int) -> _Block:
    """Of `blocks` the one for few or for many states."""
    return blocks[states >= _FEW]


def _check(q: Tensor, k: Tensor, v: Tensor, state: Tensor, out: Tensor, slopes: Sequence[float]) -> None:
    _batch, heads, head_dim = q.shape
    if not q.shape == k.shape == v.shape == out.shape:
        raise ValueError(
            f"q, k, v and out must have one shape, got {[tuple(x.shape) for x in (q, k, v, out)]}"
        )
    if q.dtype == torch.float16:
        raise ValueError("Lightning Attention takes bfloat16 or float32, not float16; convert the inputs")
    if (
        state.shape[1:] != (heads, head_dim, head_dim)
        or state.dtype != torch.float32
        or not state.is_contiguous()
    ):
        raise ValueError(
            f"state must be contiguous float32 [slots, {heads}, {head_dim}, {head_dim}], got {state.dtype} "
            f"{tuple(state.shape)}"
        )
    if len(slopes) != heads:
        raise ValueError(f"slopes names {len(slopes)} heads but q has {heads}; give one decay rate per head")
    if any(x.stride(-1) != 1 for x in (q, k, v)) or not out.is_contiguous():
        raise ValueError(
            "q, k, v need a contiguous last dimension and out must be contiguous; call .contiguous()"
        )


@torch.library.custom_op("hypenet::lightning_decode", mutates_args=("state", "out"))
def _decode_op(
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
    block = _block(_IN_PLACE, batch * heads)
    columns = min(block.columns, head_dim)
    decode_in_place[(head_dim // columns, batch * heads)](
        q, k, v, state, slots, out, log2_gammas(tuple(slopes), q.device), scale, heads,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], D=head_dim, BV=columns, num_warps=block.warps,
    )  # fmt: skip


@torch.library.custom_op(
    "hypenet::lightning_decode_deferred", mutates_args=("state", "key_window", "value_window", "out")
)
def _decode_deferred_op(
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
    block = _block(_DEFERRED, batch * heads)
    columns = min(block.columns, head_dim)
    decode_deferred[(head_dim // columns, batch * heads)](
        q, k, v, state, key_window, value_window, slots, pending, out, log2_gammas(tuple(slopes), q.device), scale,
        heads, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        D=head_dim, BV=columns, BD=min(block.rows, head_dim), STAGES=block.stages, WINDOW=WINDOW, num_warps=block.warps,
    )  # fmt: skip


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
    """The definition, in any dtype: S <- gamma S + k^T v, out = scale q S for every sequence with a slot."""
    seated = slots >= 0
    at = slots[seated].long()
    gamma = torch.exp(-torch.tensor(slopes, dtype=state.dtype, device=q.device))[:, None, None]
    q_rows, k_rows, v_rows = (x[seated].to(state.dtype) for x in (q, k, v))
    state[at] = gamma * state[at] + k_rows[..., :, None] * v_rows[..., None, :]
    out.zero_()
    out[seated] = (scale * torch.einsum("bhk,bhkv->bhv", q_rows, state[at])).to(out.dtype)


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
    """One token per sequence; `state` is updated in place and `out` written."""
    _check(q, k, v, state, out, slopes)
    step = torch.ops.hypenet.lightning_decode if q.is_cuda else plain_lightning_decode
    step(q, k, v, state, slots, slopes, scale, out)


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
    """Replays each sequence's pending tokens on a copy of its state; keeps the copy when the window is full."""
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
    """As `lightning_decode`, but the state is read every step and written every WINDOW steps: half the memory traffic.

    key_window, value_window [slots, heads, WINDOW, head_dim] in k's dtype hold the tokens the state does not know yet;
    `pending` int [batch] says how many (0 after a prefill, then counting up modulo WINDOW; the caller counts).
    """
    _check(q, k, v, state, out, slopes)
    expected = (state.shape[0], q.shape[1], WINDOW, q.shape[2])
    for window in (key_window, value_window):
        if window.shape != expected or window.dtype != k.dtype or not window.is_contiguous():
            raise ValueError(f"key_window and value_window must be contiguous {k.dtype} {list(expected)}")
    step = torch.ops.hypenet.lightning_decode_deferred if q.is_cuda else plain_lightning_decode_deferred
    step(q, k, v, state, key_window, value_window, slots, pending, slopes, scale, out)
