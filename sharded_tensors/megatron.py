"""Megatron's sharded tensors as rectangles of global tensors, to be saved and filled at any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from torch import Tensor

from hypenet_megatron.model import LocalModel
from sharded_tensors.reader import NameFilter
from sharded_tensors.rectangles import Rectangle, TensorInfo
from sharded_tensors.views import TensorView, copy_blocks


def model_entries(
    model: LocalModel, keep: NameFilter | None = None
) -> list[ShardedTensor | ShardedTensorFactory]:
    """Megatron's description of this rank's part of the model, restricted to the names that `keep` accepts.

    Extra state of Transformer Engine is a pickle and is left out.
    """
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return [
        entry
        for entry in model.sharded_state_dict(metadata=metadata).values()
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory)) and (keep is None or keep(entry.key))
    ]


def pieces_of(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The rectangles of one entry. Feed-forward gate and up projection are one parameter but two rectangles."""
    return list(nested_values([entry.build()])) if isinstance(entry, ShardedTensorFactory) else [entry]


def model_pieces(model: LocalModel, keep: NameFilter | None = None) -> list[ShardedTensor]:
    """The rectangles that this rank holds of the model's tensors. Their data are views of the parameters."""
    return [piece for entry in model_entries(model, keep) for piece in pieces_of(entry)]


def rectangle_of(piece: ShardedTensor) -> Rectangle:
    return Rectangle(
        tuple(piece.global_offset), (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    )


def owned_tensors(
    pieces: Sequence[ShardedTensor],
) -> tuple[dict[str, TensorInfo], dict[tuple[str, Rectangle], Tensor]]:
    """What this rank has to save: the pieces of which it holds the main replica, as `LocalRectangles` takes them."""
    own = [piece for piece in pieces if is_main_replica(piece.replica_id)]
    infos = {piece.key: TensorInfo(tuple(piece.global_shape), piece.data.dtype) for piece in own}
    return infos, {(piece.key, rectangle_of(piece)): piece.data for piece in own}


@torch.no_grad()
def fill_pieces(
    pieces: Sequence[ShardedTensor],
    view: TensorView,
    holder: str | Path,
    rename: Callable[[str], str] | None = None,
) -> None:
    """Copy the stored tensors into the data of `pieces`, in the dtype of these.

    `rename` maps a name of the model to the stored one; pieces that it maps to "" stay as they are. ValueError names
    `holder` and the tensor that is missing or of another shape.
    """
    for piece in pieces:
        name = rename(piece.key) if rename else piece.key
        if not name:
            continue
        if name not in view:
            raise ValueError(f"{holder} lacks the tensor {name}; give the weights of this model")
        if view.infos[name].shape != tuple(piece.global_shape):
            raise ValueError(
                f"{holder}: tensor {name} has shape {list(view.infos[name].shape)} where the model needs "
                f"{list(piece.global_shape)}; give the weights of this model"
            )
        copy_blocks(view.rectangle(name, rectangle_of(piece)), piece.data)
