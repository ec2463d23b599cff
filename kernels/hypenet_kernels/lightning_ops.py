"""Lightning Attention as a custom operator: forward and backward in Triton, visible to autograd and torch.compile."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hypenet_kernels.launch import PreparedLaunch, layout_key
from hypenet_kernels.lightning import chunked_lightning_attention
from hypenet_kernels.operators import operators_are_watched, refuse_second_derivative
from hypenet_kernels.segments import batch_items, log2_gammas, packed_items
from hypenet_kernels.tiles import choose_tile, device_limits

HEAD_DIMS = (64, 128)
_LIBRARY = torch.library.Library("hypenet", "FRAGMENT")
_LIBRARY.define(
    "lightning_attention(Tensor q, Tensor k, Tensor v, float[] slopes, float scale, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool exact, bool output_final_state, bool tf32) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "lightning_attention_backward(Tensor do, Tensor? d_final_state, Tensor q, Tensor k, Tensor v, float[] slopes, "
    "float scale, Tensor? initial_state, Tensor? cu_seqlens, bool exact, bool tf32) -> (Tensor, Tensor, Tensor, Tensor)"
)


Kernel = Literal["forward", "backward"]
_SCANS: dict[Kernel, int] = {"forward": 1, "backward": 3}
# Beyond this many layouts (lengths that come and go) all are forgotten; compiled kernels stay in Triton's own cache.
_MOST_LAYOUTS = 4096
_launches: dict[Hashable, tuple[PreparedLaunch, Tensor]] = {}


def _prepared(
    kernel: Kernel,
    tensors: tuple[Tensor, ...],
    slopes: Sequence[float],
    scale: float,
    cu_seqlens: Tensor | None,
    exact: bool,
    tf32: bool,
    **states: bool,
) -> tuple[PreparedLaunch, Tensor]:
    """A launch for inputs of this layout (q, k, v and, backward, do), and the work list to pass to it."""
    sequences = None if cu_seqlens is None else len(cu_seqlens)
    key = (
        kernel,
        tensors[0].device,
        layout_key(*tensors),
        tuple(slopes),
        scale,
        sequences,
        exact,
        tf32,
        *states.values(),
    )
    found = _launches.get(key)
    if found is None:
        if len(_launches) >= _MOST_LAYOUTS:
            _launches.clear()
        items = _items(kernel, tensors[0], slopes, cu_seqlens, exact)
        launch = _prepare(kernel, tensors, slopes, scale, len(items), tf32, states)
        found = _launches[key] = launch, items
    launch, items = found
    # Where packed sequences begin is only known on the device, and may differ from call to call.
    return launch, items if cu_seqlens is None else _items(kernel, tensors[0], slopes, cu_seqlens, exact)


def _prepare(
    kernel: Kernel,
    tensors: tuple[Tensor, ...],
    slopes: Sequence[float],
    scale: float,
    items: int,
    tf32: bool,
    states: dict[str, bool],
) -> PreparedLaunch:
    from hypenet_kernels.triton_kernels import lightning_scan

    q = tensors[0]
    heads, head_dim = q.shape[2:]
    tile = choose_tile(kernel, q.dtype, device_limits(q.device))
    columns = min(tile.columns, head_dim)
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    constants = {
        "D": head_dim,
        "BV": columns,
        "C": tile.chunk,
        "STAGES": tile.stages,
        **states,
        "PRECISION": "tf32" if tf32 or q.dtype == torch.bfloat16 else "ieee",
    }
    return PreparedLaunch(
        lightning_scan.lightning_forward if kernel == "forward" else lightning_scan.lightning_backward,
        (_SCANS[kernel] * head_dim // columns, items, 1),
        (*strides, log2_gammas(tuple(slopes), q.device), scale, heads),
        constants,
        num_warps=tile.warps,
    )


def _items(
    kernel: Kernel, q: Tensor, slopes: Sequence[float], cu_seqlens: Tensor | None, exact: bool
) -> Tensor:
    batch, time, _heads, head_dim = q.shape
    limits = device_limits(q.device)
    tile = choose_tile(kernel, q.dtype, limits)
    blocks_per_item = _SCANS[kernel] * head_dim // min(tile.columns, head_dim)
    slots = max(1, limits.multiprocessors * tile.blocks_per_multiprocessor // blocks_per_item)
    if cu_seqlens is not None:
        return packed_items(tuple(slopes), cu_seqlens, time, tile.chunk, slots, exact)
    return batch_items(tuple(slopes), batch, time, tile.chunk, slots, exact, q.device)


def _states(q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return sequences, q.shape[2], q.shape[3], q.shape[3]


def _readable(x: Tensor) -> Tensor:
    """Any batch, time and head strides; a gradient may arrive expanded, and then it is written out."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(q: Tensor) -> Tensor:
    """Contiguous, whatever q's strides are."""
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Sequence[float],
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    exact: bool,
    output_final_state: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    inputs = _readable(q), _readable(k), _readable(v)
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    o = _like(q)
    final_state = torch.empty(
        _states(q, cu_seqlens) if output_final_state else 0, dtype=torch.float32, device=q.device
    )
    if output_final_state and cu_seqlens is not None:  # no block visits a sequence without tokens
        final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
    launch, items = _prepared(
        "forward", inputs, slopes, scale, cu_seqlens, exact, tf32,
        HAS_INITIAL=initial_state is not None, HAS_FINAL=output_final_state,
    )  # fmt: skip
    launch(*inputs, o, initial_state, final_state, items)
    return o, final_state


def _backward(
    do: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Sequence[float],
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    exact: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = _readable(q), _readable(k), _readable(v), _readable(do)
    dq, dk, dv = _like(q), _like(q), _like(q)
    has_states = initial_state is not None or d_final_state is not None
    states = _states(q, cu_seqlens) if has_states else 0
    if has_states:  # the kernel reads both or none
        initial_state, d_final_state = (
            q.new_zeros(states, dtype=torch.float32) if state is None else state.float().contiguous()
            for state in (initial_state, d_final_state)
        )
    d_initial_state = torch.empty(states, dtype=torch.float32, device=q.device)
    if not has_states:  # pointers all the same, never read
        initial_state = d_final_state = d_initial_state
    if has_states and cu_seqlens is not None and d_final_state is not None:
        d_initial_state.copy_(d_final_state)  # no block visits a sequence without tokens
    launch, items = _prepared(
        "backward", inputs, slopes, scale, cu_seqlens, exact, tf32, HAS_STATES=has_states
    )
    launch(*inputs, dq, dk, dv, initial_state, d_final_state, d_initial_state, items)
    return dq, dk, dv, d_initial_state


def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, slopes: Sequence[float], scale: float, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, exact: bool, output_final_state: bool, tf32: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    state = _states(q, cu_seqlens) if output_final_state else 0
    return q.new_empty(q.shape), q.new_empty(state, dtype=torch.float32)


def _backward_shapes(
    do: Tensor, d_final_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, slopes: Sequence[float], scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, exact: bool, tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    state = 0 if initial_state is None and d_final_state is None else _states(q, cu_seqlens)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    return dq, dk, dv, q.new_empty(state, dtype=torch.float32)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.slopes, ctx.scale, initial_state, cu_seqlens, ctx.exact, _, ctx.tf32 = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, initial_state, cu_seqlens)


def _gradients(ctx: Any, do: Tensor | None, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, initial_state, cu_seqlens = ctx.saved_tensors
    if d_final_state is not None and d_final_state.numel() == 0:
        d_final_state = None
    dq, dk, dv, d_initial_state = torch.ops.hypenet.lightning_attention_backward(
        torch.zeros_like(q) if do is None else do, d_final_state, q, k, v, ctx.slopes, ctx.scale,
        initial_state, cu_seqlens, ctx.exact, ctx.tf32,
    )  # fmt: skip
    return dq, dk, dv, None, None, None if initial_state is None else d_initial_state, *(None,) * 4


class _EagerLightningAttention(torch.autograd.Function):
    """The operator without its dispatcher, which costs as much as a short sequence: same functions, same results.

    Autograd asks for something per input and per output, so there are as few of them as can be: what is no tensor to
    differentiate comes in one tuple, and the final state is an output only if it was asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, others: tuple[Any, ...]
    ) -> Tensor | tuple[Tensor, Tensor]:
        slopes, scale, cu_seqlens, exact, output_final_state, tf32 = ctx.others = others
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, initial_state, cu_seqlens)
        o, state = _forward(
            q, k, v, slopes, scale, initial_state, cu_seqlens, exact, output_final_state, tf32
        )
        return (o, state) if output_final_state else o

    @staticmethod
    def backward(
        ctx: Any, do: Tensor | None, d_final_state: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("Lightning Attention")
        q, k, v, initial_state, cu_seqlens = ctx.saved_tensors
        slopes, scale, _, exact, _, tf32 = ctx.others
        dq, dk, dv, d_initial_state = _backward(
            torch.zeros_like(q) if do is None else do, d_final_state, q, k, v, slopes, scale, initial_state,
            cu_seqlens, exact, tf32,
        )  # fmt: skip
        return dq, dk, dv, None if initial_state is None else d_initial_state, None


# On CPU the same kernels run in Triton's interpreter, for tests.
for _device in ("CUDA", "CPU"):
    _LIBRARY.impl("lightning_attention", _forward, _device)
    _LIBRARY.impl("lightning_attention_backward", _backward, _device)
torch.library.register_fake("hypenet::lightning_attention", _forward_shapes, lib=_LIBRARY)
torch.library.register_fake("hypenet::lightning_attention_backward", _backward_shapes, lib=_LIBRARY)
torch.library.register_autograd(
    "hypenet::lightning_attention", _gradients, setup_context=_keep_inputs, lib=_LIBRARY
)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Sequence[float],
    scale: float,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
    output_final_state: bool = False,
    tf32: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Lightning Attention with one fixed decay per head; differentiable in q, k, v and initial_state.

        S_t = gamma_h S_{t-1} + k_t^T v_t,   o_t = scale * q_t S_t,   gamma_h = exp(-slopes[h])

    q, k, v [batch, time, heads, head_dim], bfloat16 or float32, head_dim 64 or 128 on CUDA; any strides with a
    contiguous last dimension, so views of a fused projection need no copies. Returns o [batch, time, heads, head_dim]
    in q's dtype and, if asked for, the state after the last token, fp32 [batch, heads, head_dim (of k), head_dim (of
    v)]. There is no second derivative, so create_graph=True is refused.

    cu_seqlens, int [sequences + 1] on q's device: batch is 1 and holds sequences one after the other, number n from
    token cu_seqlens[n] to cu_seqlens[n + 1]; no state crosses a boundary, and states are [sequences, heads, ...].

    On CUDA a sequence is cut into segments that run side by side. Each rebuilds its start state from the tokens before
    it whose weight gamma^distance is above 2^-25; what is left out changes o by at most 2^-25 / (1 - gamma) times the
    largest |scale q.k| |v| (below fp32 rounding of the sum itself). Segments are only cut where that is faster; `exact`
    never cuts. `tf32` lets fp32 products use tensor cores (relative error 1e-3 instead of 1e-6). Results are the same
    bit for bit from run to run. On CPU the chunked PyTorch form runs, which is always exact.
    """
    _check(q, k, v, slopes, initial_state, cu_seqlens)
    if q.is_cuda:
        watched = operators_are_watched(q)
        if torch.is_grad_enabled() and not watched:
            others = (slopes, scale, cu_seqlens, exact, output_final_state, tf32)
            found = _EagerLightningAttention.apply(q, k, v, initial_state, others)
            return found if output_final_state else (found, None)
        attention = torch.ops.hypenet.lightning_attention if watched else _forward
        o, state = attention(
            q, k, v, slopes, scale, initial_state, cu_seqlens, exact, output_final_state, tf32
        )
        return o, state if output_final_state else None
    rates = torch.tensor(slopes, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    if cu_seqlens is None:
        o, state = chunked_lightning_attention(q, k, v, rates, scale, initial_state)
        return o, state if output_final_state else None
    parts = []
    for number, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        before = None if initial_state is None else initial_state[number : number + 1]
        one = slice(start, end)
        parts.append(chunked_lightning_attention(q[:, one], k[:, one], v[:, one], rates, scale, before))
    o = torch.cat([o for o, _ in parts], 1)
    return o, torch.cat([state for _, state in parts]) if output_final_state else None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Sequence[float],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Refuses what the kernels would misread."""
    shape, dtype = q.shape, q.dtype
    if len(shape) != 4 or not shape == k.shape == v.shape or not dtype == k.dtype == v.dtype:
        raise ValueError(
            "q, k and v must have one dtype and one shape [batch, time, heads, head_dim] (repeat shared key heads "
            f"first), got {[(tuple(x.shape), x.dtype) for x in (q, k, v)]}"
        )
    if dtype == torch.float16:
        raise ValueError(
            "float16 overflows in the recurrent state; convert q, k and v to bfloat16 or float32"
        )
    _batch, _time, heads, head_dim = shape
    if len(slopes) != heads:
        raise ValueError(f"slopes names {len(slopes)} heads but q has {heads}; give one decay rate per head")
    if q.is_cuda and head_dim not in HEAD_DIMS:
        raise ValueError(
            f"head_dim is {head_dim}; the kernels are built for {HEAD_DIMS}: pad or use CPU tensors"
        )
    if cu_seqlens is not None and (
        q.shape[0] != 1 or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point()
    ):
        raise ValueError("packed sequences lie in one row: batch must be 1 and cu_seqlens an integer vector")
    if initial_state is not None and initial_state.shape != (expected := _states(q, cu_seqlens)):
        raise ValueError(f"initial_state must be {list(expected)}, got {list(initial_state.shape)}")
