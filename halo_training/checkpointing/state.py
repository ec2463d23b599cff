"""The content of a training checkpoint as Megatron's sharded tensors: weights, fp32 master weights, Adam's moments.

A sharded tensor says which rectangle of which global tensor a rank holds, so a checkpoint can be loaded at any layout.
Names are Megatron's keys: K for a weight, optimizer.state.{fp32_param,exp_avg,exp_avg_sq}.K for its optimizer state.
They are the same with and without the distributed optimizer. Megatron gathers the distributed optimizer's entire state
on every data-parallel rank to make it reshardable. Here each rank describes its own slice as rectangles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from hypenet_megatron.model import LocalModel
from sharded_tensors.index import OPTIMIZER_PREFIX
from sharded_tensors.megatron import model_entries, pieces_of
from sharded_tensors.reader import NameFilter

MASTER_WEIGHT, MOMENTS = "fp32_param", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Updated:
    """The part of a parameter that this rank's optimizer updates: elements [start, stop) of the flattened tensor.

    `main` is the tensor that Adam updates: the parameter, its fp32 copy, or a flat slice of either.
    """

    parameter: Tensor
    main: Tensor
    start: int
    stop: int
    inner: torch.optim.Optimizer
    instance: int | None = None  # of the distributed optimizer; None without it


def flat_boxes(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Split elements [start, stop) of a row-major tensor of `shape` into rectangles (offsets, sizes), in order.

    A tensor of n dimensions needs at most 2 n - 1 of them.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    cuts = sorted({start, min(stop, -(-start // row) * row), max(start, stop // row * row), stop})
    for first, last in pairwise(cuts):
        if first % row == 0 and last % row == 0:
            yield (first // row, *[0] * (len(shape) - 1)), ((last - first) // row, *shape[1:])
            continue
        index = first // row
        for offsets, sizes in flat_boxes(shape[1:], first - index * row, last - index * row):
            yield (index, *offsets), (1, *sizes)


def _master_weights(part: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of bf16 parameters and their fp32 copies in an optimizer that is not distributed."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for group, masters in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(group, masters, strict=True)


def _updated(optimizer: MegatronOptimizer) -> Iterator[_Updated]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False):
            continue
        groups = part.optimizer.param_groups
        if isinstance(part, DistributedOptimizer):
            for parameter, (group, position) in part.model_param_group_index_map.items():
                owned = part._get_model_param_range_map(parameter)["param"]
                yield _Updated(
                    parameter,
                    groups[group]["params"][position],
                    owned.start,
                    owned.end,
                    part.optimizer,
                    part.distributed_optimizer_instance_id,
                )
        else:
            parameters = {id(main): parameter for parameter, main in _master_weights(part)}
            for main in (main for group in groups for main in group["params"]):
                yield _Updated(parameters.get(id(main), main), main, 0, main.numel(), part.optimizer)


def _prime(updated: _Updated) -> None:
    """Create the moments that Adam would create in its first step, so that a checkpoint can be loaded into them."""
    state = updated.inner.state[updated.main]
    for name in MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(updated.main.data)


def _optimizer_shards(
    updated: _Updated, entry: ShardedTensor | ShardedTensorFactory
) -> Iterator[ShardedTensor]:
    state = updated.inner.state[updated.main]
    tensors = {name: state[name] for name in MOMENTS}
    if updated.parameter.dtype != torch.float32:  # fp32 weights are their own master weights
        tensors[MASTER_WEIGHT] = updated.main
    for piece in pieces_of(entry):
        begin = piece.data.storage_offset() - entry.data.storage_offset()
        assert piece.data.is_contiguous(), f"{piece.key} is not a range of its parameter"
        assert piece.prepend_axis_num == 0, f"{piece.key} is stacked over layers"
        replica = piece.replica_id
        if updated.instance is not None:
            replica = (*replica[:2], updated.instance)
        lowest = max(updated.start, begin)
        offset = lowest - updated.start  # in the optimizer's flat tensors
        boxes = flat_boxes(
            piece.local_shape, lowest - begin, min(updated.stop, begin + piece.data.numel()) - begin
        )
        for offsets, sizes in boxes:
            count = math.prod(sizes)
            for name, tensor in tensors.items():
                data = tensor.detach().view(-1)[offset : offset + count].view(sizes)
                yield replace(
                    piece,
                    key=f"{OPTIMIZER_PREFIX}state.{name}.{piece.key}",
                    data=data,
                    dtype=data.dtype,
                    local_shape=sizes,
                    global_offset=tuple(
                        whole + own for whole, own in zip(piece.global_offset, offsets, strict=True)
                    ),
                    axis_fragmentations=None,
                    replica_id=replica,
                )
            offset += count


def training_shards(
    model: LocalModel, optimizer: MegatronOptimizer, keep: NameFilter | None
) -> list[ShardedTensor]:
    """All tensors of this rank that a checkpoint saves and restores. Their `data` are views of the live tensors.

    Replicas are included, because a load fills all of them; a save writes only main replicas. `keep` selects weights,
    with their optimizer state, by name.
    """
    entries = model_entries(model, keep)
    by_parameter = {id(entry.data): entry for entry in entries}
    shards = [piece for entry in entries for piece in pieces_of(entry)]
    for updated in _updated(optimizer):
        _prime(updated)
        shards += _optimizer_shards(updated, by_parameter[id(updated.parameter)])
    return shards


def set_optimizer_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Set Adam's step count, which torch keeps per parameter, Apex and Transformer Engine per parameter group."""
    for updated in _updated(optimizer):
        if isinstance(updated.inner, (torch.optim.Adam, torch.optim.AdamW)):
            # One tensor per parameter: a shared tensor would count the updates of all parameters.
            updated.inner.state[updated.main]["step"] = torch.tensor(float(step))
        else:
            for group in updated.inner.param_groups:
                group["step"] = step
