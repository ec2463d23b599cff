"""What mixers exchange when the sequence is split over ranks: heads for softmax attention, states for Lightning.

Rank r of n holds tokens r * s / n ... (r + 1) * s / n - 1: contiguous slices, for everything. A recurrent layer then
hands on one state per rank (with the zig-zag slices of ring attention it would be two), and softmax attention does not
mind: after the all-to-all every rank has whole sequences of some heads, so causality costs all ranks the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor


def sequence_slice(x: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's contiguous slice of `x` along `axis`, a view."""
    return x.chunk(group.size(), axis)[group.rank()]


def heads_for_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s / n, b, heads, dh] of all heads to [s, b, heads / n, dh] of the whole sequence, differentiable.

    Rank r gets heads r * heads / n onwards; n has to divide heads.
    """
    ranks = group.size()
    if ranks == 1:
        return x
    by_rank = x.unflatten(2, (ranks, -1)).movedim(2, 0)
    return all_to_all(group, by_rank.flatten(0, 1))


def sequence_for_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back: [s, b, heads / n, dh] to [s / n, b, heads, dh], differentiable."""
    ranks = group.size()
    if ranks == 1:
        return x
    return all_to_all(group, x).unflatten(0, (ranks, -1)).movedim(0, 2).flatten(2, 3)


def shared_heads_for_sequence(x: Tensor, query_heads: int, group: dist.ProcessGroup) -> Tensor:
    """`heads_for_sequence` for the key or value heads [s / n, b, kv groups, dh] of `query_heads` query heads.

    Fewer groups than ranks are repeated just often enough that every rank gets those of its query heads.
    """
    groups = x.shape[2]
    repeats = group.size() // math.gcd(groups, group.size())
    assert query_heads % (groups * repeats) == 0, "ParallelLayout.check_model lets no such layout pass"
    return heads_for_sequence(x.repeat_interleave(repeats, 2) if repeats > 1 else x, group)


@functools.lru_cache
def _rates(slopes: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Decay rates of the heads. Kept, for to make them is a copy to the GPU that waits for all it has to do."""
    return torch.tensor(slopes, dtype=dtype, device=device)


def state_before_slice(k: Tensor, v: Tensor, slopes: Sequence[float], group: dist.ProcessGroup) -> Tensor:
    """Lightning's state before this rank's slice, from every rank's keys and values, differentiable.

        S(r)      = sum over t in slice r of gamma^(L - 1 - t) k_t^T v_t
        before(r) = sum over j < r of gamma^((r - 1 - j) L) S(j)

    k, v [batch, L, heads, head_dim]; the result is [batch, heads, head_dim, head_dim], fp32 (fp64 when k is). What
    travels is one state per rank and layer, whatever the length: an all-gather forward, a reduce-scatter backward.
    """
    ranks, length = group.size(), k.shape[1]
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    rates = _rates(tuple(slopes), dtype, k.device)
    to_end = torch.arange(length - 1, -1, -1, dtype=dtype, device=k.device)
    weighted = k * torch.exp(-to_end[:, None] * rates)[:, :, None].to(k.dtype)
    state = torch.einsum("blhk,blhv->bhkv", weighted, v).to(dtype)
    states = gather_from_sequence_parallel_region(state[None], group=group)
    distance = group.rank() - 1 - torch.arange(ranks, dtype=dtype, device=k.device)
    decay = torch.exp(-distance.clamp(min=0)[:, None] * length * rates) * (distance >= 0)[:, None]
    return torch.einsum("rh,rbhkv->bhkv", decay, states)
