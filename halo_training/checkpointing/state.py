"""What a training checkpoint holds, as Megatron's sharded tensors: weights, fp32 master weights, Adam's moments.

A sharded tensor says which rectangle of which global tensor a rank has, so nothing here or in the files depends on
the layout. Keys are Megatron's: K for the weight, optimizer.state.{fp32_param,exp_avg,exp_avg_sq}.K for its optimizer
state. They are the same with and without the distributed optimizer. Megatron's own way to make the latter reshardable
gathers the whole state on every data-parallel rank; here each rank describes the slice that it owns as rectangles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from hypenet_megatron.model import LocalModel

KeyFilter = Callable[[str], bool]
MASTER_WEIGHT, MOMENTS = "fp32_param", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Updated:
    """What this rank's optimizer updates of one parameter: elements [start, stop) of it, flattened.

    `main` is what Adam sees: the parameter, its fp32 copy, or a flat slice of either.
    """

    parameter: Tensor
    main: Tensor
    start: int
    stop: int
    inner: torch.optim.Optimizer
    instance: int | None = None  # of the distributed optimizer; None where every data rank holds all elements


def flat_boxes(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements [start, stop) of a row-major tensor of `shape` as (offsets, sizes) of rectangles, in their order.

    At most 2 n - 1 of them for n dimensions.
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


def _model_entries(model: LocalModel, keep: KeyFilter | None) -> list[ShardedTensor | ShardedTensorFactory]:
    """Tensors of this rank's part of the model. Extra state of Transformer Engine, a pickle, is left out."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return [
        entry
        for entry in model.sharded_state_dict(metadata=metadata).values()
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory)) and (keep is None or keep(entry.key))
    ]


def _pieces(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The rectangles of one entry: feed-forward gate and up projection lie in one parameter and are two of them."""
    return list(nested_values([entry.build()])) if isinstance(entry, ShardedTensorFactory) else [entry]


def _master_weights(part: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """bf16 parameters with their fp32 copies, of an optimizer that holds all elements."""
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
    """Give Adam the state that its first step would, so that there is something to load into."""
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
    for piece in _pieces(entry):
        begin = piece.data.storage_offset() - entry.data.storage_offset()
        assert piece.data.is_contiguous(), f"{piece.key} is not a range of its parameter"
        assert piece.prepend_axis_num == 0, f"{piece.key} is stacked over layers"
        replica = piece.replica_id
        if updated.instance is not None:
            replica = (*replica[:2], updated.instance)
        lowest = max(updated.start, begin)
        offset = lowest - updated.start  # into the flat tensors of the optimizer
        boxes = flat_boxes(
            piece.local_shape, lowest - begin, min(updated.stop, begin + piece.data.numel()) - begin
        )
        for offsets, sizes in boxes:
            count = math.prod(sizes)
            for name, tensor in tensors.items():
                data = tensor.detach().view(-1)[offset : offset + count].view(sizes)
                yield replace(
                    piece,
                    key=f"optimizer.state.{name}.{piece.key}",
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
    model: LocalModel, optimizer: MegatronOptimizer, keep: KeyFilter | None
) -> list[ShardedTensor]:
    """Everything of this rank that a checkpoint saves and restores; `data` are views of the live tensors.

    Replicas are included: a save takes only the main one, a load fills them all. `keep` restricts by the weight's key.
    """
    entries = _model_entries(model, keep)
    by_parameter = {id(entry.data): entry for entry in entries}
    shards = [piece for entry in entries for piece in _pieces(entry)]
    for updated in _updated(optimizer):
        _prime(updated)
        shards += _optimizer_shards(updated, by_parameter[id(updated.parameter)])
    return shards


def set_optimizer_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Tell Adam how many updates it has made: torch counts per parameter, Apex and Transformer Engine per group."""
    for updated in _updated(optimizer):
        if isinstance(updated.inner, (torch.optim.Adam, torch.optim.AdamW)):
            # A tensor of its own for each: one that is shared would count every parameter's update.
            updated.inner.state[updated.main]["step"] = torch.tensor(float(step))
        else:
            for group in updated.inner.param_groups:
                group["step"] = step
