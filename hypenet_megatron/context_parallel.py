"""How ranks share a sequence: in every layer, rank r of n holds tokens r * s / n to (r + 1) * s / n - 1.

With contiguous slices, a recurrent mixer passes one state per rank. The zig-zag slices of ring attention would need
two. Softmax attention exchanges heads: after an all-to-all, every rank holds the whole sequence for some of the heads,
so the causal mask gives all ranks the same amount of work.
"""

from __future__ import annotations

import math

import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all
from torch import Tensor


def sequence_slice(x: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
    """A view of this rank's contiguous slice of `x` along `axis`."""
    return x.chunk(group.size(), axis)[group.rank()]


def heads_for_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange [s / n, b, heads, dh] for the whole sequence of some heads, [s, b, heads / n, dh]. Differentiable.

    Rank r gets the heads from r * heads / n on; n must divide heads.
    """
    ranks = group.size()
    if ranks == 1:
        return x
    by_rank = x.unflatten(2, (ranks, -1)).movedim(2, 0)
    return all_to_all(group, by_rank.flatten(0, 1))


def sequence_for_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Undo `heads_for_sequence`: [s, b, heads / n, dh] to [s / n, b, heads, dh]. Differentiable."""
    ranks = group.size()
    if ranks == 1:
        return x
    return all_to_all(group, x).unflatten(0, (ranks, -1)).movedim(0, 2).flatten(2, 3)


def shared_heads_for_sequence(x: Tensor, query_heads: int, group: dist.ProcessGroup) -> Tensor:
    """`heads_for_sequence` for key or value heads [s / n, b, kv groups, dh] that `query_heads` query heads share.

    If the ranks cannot share the groups equally, each group is repeated until they can.
    """
    groups = x.shape[2]
    repeats = group.size() // math.gcd(groups, group.size())
    assert query_heads % (groups * repeats) == 0, "ParallelLayout.check_model rejects such layouts"
    return heads_for_sequence(x.repeat_interleave(repeats, 2) if repeats > 1 else x, group)
