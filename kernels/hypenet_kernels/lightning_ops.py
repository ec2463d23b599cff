"""Lightning Attention as a differentiable operator: Triton kernels on CUDA tensors, PyTorch elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from hypenet_kernels.arguments import check_slopes, reference_dtype
from hypenet_kernels.launch import PreparedLaunch, layout_key
from hypenet_kernels.lightning import chunked_lightning_attention
from hypenet_kernels.operators import Operator
from hypenet_kernels.segments import batch_items, log2_gammas, packed_items
from hypenet_kernels.tiles import choose_tile, device_limits

HEAD_DIMS = (64, 128)
Direction = Literal["forward", "backward"]
_SCANS: dict[Direction, int] = {"forward": 1, "backward": 3}
# With more layouts than this (varying lengths) all are dropped. Compiled kernels stay in Triton's own cache.
_MAX_LAYOUTS = 4096
_launches: dict[Hashable, tuple[PreparedLaunch, Tensor]] = {}


def _launch_for(
    direction: Direction,
    tensors: tuple[Tensor, ...],
    cu_seqlens: Tensor | None,
    slopes: Sequence[float],
    scale: float,
    exact: bool,
    tf32: bool,
    **states: bool,
) -> tuple[PreparedLaunch, Tensor]:
    """The launch for inputs of this layout (q, k, v and, backward, do), and the work list to pass to it."""
    slopes = tuple(slopes)
    sequences = None if cu_seqlens is None else len(cu_seqlens)
    q = tensors[0]
    key = direction, q.device, layout_key(*tensors), slopes, scale, sequences, exact, tf32, *states.values()
    found = _launches.get(key)
    if found is not None and cu_seqlens is None:
        return found
    batch, time, heads, head_dim = q.shape
    limits = device_limits(q.device)
    tile = choose_tile(direction, q.dtype, limits)
    columns = min(tile.columns, head_dim)
    blocks_per_item = _SCANS[direction] * head_dim // columns
    slots = max(1, limits.multiprocessors * tile.blocks_per_multiprocessor // blocks_per_item)
    if cu_seqlens is None:
        items = batch_items(slopes, batch, time, tile.chunk, slots, exact, q.device)
    else:  # the boundaries are known on the device only, and may change from call to call
        items = packed_items(slopes, cu_seqlens, time, tile.chunk, slots, exact)
    if found is not None:
        return found[0], items
    from hypenet_kernels.triton_kernels import lightning_scan

    strides = [stride for x in tensors for stride in x.stride()[:3]]
    launch = PreparedLaunch(
        getattr(lightning_scan, f"lightning_{direction}"),
        (blocks_per_item, len(items), 1),
        (*strides, log2_gammas(slopes, q.device), scale, heads),
        {
            "D": head_dim,
            "BV": columns,
            "C": tile.chunk,
            "STAGES": tile.stages,
            **states,
            "PRECISION": "tf32" if tf32 or q.dtype == torch.bfloat16 else "ieee",
        },
        num_warps=tile.warps,
    )
    if len(_launches) >= _MAX_LAYOUTS:
        _launches.clear()
    _launches[key] = launch, items
    return launch, items


def _state_shape(q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return sequences, q.shape[2], q.shape[3], q.shape[3]


def _readable(x: Tensor) -> Tensor:
    """Any batch, time and head strides will do. A gradient may arrive expanded, and is then copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous_like(q: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    slopes: Sequence[float],
    scale: float,
    exact: bool,
    output_final_state: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    """o and the final state, which is empty unless asked for."""
    inputs = _readable(q), _readable(k), _readable(v)
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    o = _contiguous_like(q)
    state_shape = _state_shape(q, cu_seqlens) if output_final_state else (0,)
    final_state = torch.empty(state_shape, dtype=torch.float32, device=q.device)
    if output_final_state and cu_seqlens is not None:  # no block visits a sequence without tokens
        final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
    launch, items = _launch_for(
        "forward", inputs, cu_seqlens, slopes, scale, exact, tf32,
        HAS_INITIAL=initial_state is not None, HAS_FINAL=output_final_state,
    )  # fmt: skip
    launch(*inputs, o, initial_state, final_state, items)
    return o, final_state


def _backward(
    do: Tensor | None,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    slopes: Sequence[float],
    scale: float,
    exact: bool,
    output_final_state: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and d_initial_state, which is empty if no state goes in or out."""
    inputs = _readable(q), _readable(k), _readable(v), torch.zeros_like(q) if do is None else _readable(do)
    dq, dk, dv = _contiguous_like(q), _contiguous_like(q), _contiguous_like(q)
    if not output_final_state:
        d_final_state = None
    has_states = initial_state is not None or d_final_state is not None
    states = _state_shape(q, cu_seqlens) if has_states else (0,)
    if has_states:  # the kernel reads both or none
        initial_state, d_final_state = (
            q.new_zeros(states, dtype=torch.float32) if state is None else state.float().contiguous()
            for state in (initial_state, d_final_state)
        )
    d_initial_state = torch.empty(states, dtype=torch.float32, device=q.device)
    if not has_states:  # the kernel needs pointers, but does not read from them
        initial_state = d_final_state = d_initial_state
    if has_states and cu_seqlens is not None and d_final_state is not None:
        d_initial_state.copy_(d_final_state)  # no block visits a sequence without tokens
    launch, items = _launch_for(
        "backward", inputs, cu_seqlens, slopes, scale, exact, tf32, HAS_STATES=has_states
    )
    launch(*inputs, dq, dk, dv, initial_state, d_final_state, d_initial_state, items)
    return dq, dk, dv, d_initial_state


def _shapes(q: Tensor, cu_seqlens: Tensor | None, outputs: int, has_state: bool) -> tuple[Tensor, ...]:
    state = _state_shape(q, cu_seqlens) if has_state else 0
    return *(q.new_empty(q.shape) for _ in range(outputs)), q.new_empty(state, dtype=torch.float32)


# On CPU the same kernels run in Triton's interpreter, for tests.
_fused_backward = Operator(
    "lightning_attention_backward",
    _backward,
    lambda _do, d_final, q, _k, _v, initial, cu_seqlens, _slopes, _scale, _exact, has_final, _tf32: _shapes(
        q, cu_seqlens, 3, initial is not None or (has_final and d_final is not None)
    ),
)
fused_lightning_attention = Operator(
    "lightning_attention",
    _forward,
    lambda q, _k, _v, _initial, cu_seqlens, _slopes, _scale, _exact, has_final, _tf32: _shapes(
        q, cu_seqlens, 1, has_final
    ),
    backward=_fused_backward,
    tensors=5,
    unused_outputs=True,
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
    """Lightning Attention with one fixed decay per head.

        S_t = gamma_h S_{t-1} + k_t^T v_t,   o_t = scale * q_t S_t,   gamma_h = exp(-slopes[h])

    Differentiable once in q, k, v and initial_state. Results are the same bit for bit from run to run.

    On CUDA a sequence is cut into segments that run in parallel. Each segment rebuilds its start state from the tokens
    before it whose weight gamma^distance is above 2^-25. What is left out changes o by at most 2^-25 / (1 - gamma)
    times the largest |scale q.k| |v|, which is below the fp32 rounding of the sum. Sequences are cut only where that is
    faster. On CPU the chunked PyTorch form runs, which never cuts.

    Args:
        q, k, v: [batch, time, heads, head_dim], bf16 or fp32. On CUDA head_dim is 64 or 128. The last dimension is
            contiguous, other strides are free, so views of a fused projection need no copy.
        slopes: decay rate of each head, [heads].
        scale: factor of q, commonly head_dim^-0.5.
        initial_state: fp32 [batch, heads, head_dim (of k), head_dim (of v)]; zeros if None.
        cu_seqlens: int [sequences + 1] on q's device, for batch 1: sequence n is tokens cu_seqlens[n] to
            cu_seqlens[n + 1]. No state crosses a boundary, and states are [sequences, heads, ...].
        exact: never cut a sequence.
        output_final_state: also return the state after the last token.
        tf32: use TF32 tensor cores for fp32 products (relative error 1e-3 instead of 1e-6).

    Returns:
        o [batch, time, heads, head_dim] in q's dtype, and the final state in fp32 or None.

    Raises:
        ValueError: shapes, dtypes or sizes that the kernels would misread.
    """
    _check(q, k, v, slopes, initial_state, cu_seqlens)
    if q.is_cuda:
        o, state = fused_lightning_attention(
            q, k, v, initial_state, cu_seqlens, slopes, scale, exact, output_final_state, tf32
        )
        return o, state if output_final_state else None
    rates = torch.tensor(slopes, dtype=reference_dtype(q))
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
    check_slopes(slopes, shape[2])
    if q.is_cuda and shape[3] not in HEAD_DIMS:
        raise ValueError(
            f"head_dim is {shape[3]}, but the kernels support {HEAD_DIMS}; pad the heads or use CPU tensors"
        )
    if cu_seqlens is not None and (
        q.shape[0] != 1 or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point()
    ):
        raise ValueError("with cu_seqlens, batch must be 1 and cu_seqlens an integer vector")
    if initial_state is not None and initial_state.shape != (expected := _state_shape(q, cu_seqlens)):
        raise ValueError(f"initial_state must be {list(expected)}, got {list(initial_state.shape)}")
