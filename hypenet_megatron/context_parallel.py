"""How ranks share a sequence: rank r of n holds tokens r * s / n ... (r + 1) * s / n - 1, in every layer.

With contiguous slices a recurrent mixer passes one state per rank (the zig-zag slices of ring attention would need
two). Softmax attention exchanges heads: after the all-to-all every rank has whole sequences of some heads, so the
causal mask costs all ranks the same.
"""

from __future__ import annotations

import math

import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all
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
