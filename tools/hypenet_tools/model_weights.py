"""Weights folders of models in memory, at any layout: every rank writes what it owns and reads what it needs.

What a rank has of which tensor is Megatron's to say (`sharded_state_dict`); gated feed-forward weights come as
factories, one parameter that is two pieces of the whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from torch import Tensor

from durable_files import discard_leftovers, publish_folder, temporary_sibling
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import LocalModel, model_chunks
from hypenet_megatron.presets import ModelShape
from hypenet_tools.convert import SHARD_BYTES, weights_job
from hypenet_tools.folder_job import Sums, run_afresh
from hypenet_tools.hugging_face.config import ModelDescription
from hypenet_tools.layout import Layout
from hypenet_tools.weights_folder import Index, StoredChunk, WeightsFolder, close_folder
from sharded_tensors.rectangles import Chunk
from sharded_tensors.views import TensorInfo, TensorsInMemory, TensorView, as_view
from sharded_tensors.writer import Shard, ShardTensor, fill_shards

KeyFilter = Callable[[str], bool]


def sharded_tensors(model: LocalModel, keep: KeyFilter | None = None) -> list[ShardedTensor]:
    """This rank's pieces of the model's tensors, restricted to the keys of whole tensors that `keep` accepts.

    Their data are views of the parameters. Extra state of Transformer Engine, a pickle, is left out.
    """
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    pieces: list[ShardedTensor] = []
    for entry in model.sharded_state_dict(metadata=metadata).values():
        if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
            continue
        if keep is None or keep(entry.key):
            pieces += nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    return pieces


def _chunk(piece: ShardedTensor) -> Chunk:
    return Chunk(tuple(piece.global_offset), (1,) * piece.prepend_axis_num + tuple(piece.local_shape))


def load_weights(
    source: Path | Mapping[str, Tensor],
    model: LocalModel,
    *,
    rename: Callable[[str], str] | None = None,
) -> None:
    """Load a weights folder, or whole tensors (in memory or a view), into this rank's part of `model`, in its dtype.

    `rename` maps a key of the whole model to the stored key; what it maps to "" is left as it is in the model.
    ValueError when a file is damaged (all ranks share the reading), a tensor is missing or of another shape.
    """
    view = read_weights(source) if isinstance(source, Path) else as_view(source)
    holder = source if isinstance(source, Path) else "what is to be loaded"
    pieces = sharded_tensors(model)
    if rename is None and parallel_state.get_pipeline_model_parallel_world_size() == 1:
        left_over = sorted(view.infos.keys() - {piece.key for piece in pieces})
        if left_over:
            raise ValueError(f"{holder}: the model has no tensor {left_over[0]} ({len(left_over)} left over)")
    for piece in pieces:
        stored = rename(piece.key) if rename else piece.key
        if not stored:
            continue
        if stored not in view:
            raise ValueError(f"{holder} lacks the tensor {stored}; give the weights of this model")
        if view.infos[stored].shape != tuple(piece.global_shape):
            raise ValueError(
                f"{holder}: tensor {stored} has shape {list(view.infos[stored].shape)} where the model needs "
                f"{list(piece.global_shape)}; give the weights of this model"
            )
        _fill(piece, view, stored)


@torch.no_grad()
def _fill(piece: ShardedTensor, view: TensorView, name: str) -> None:
    chunk = _chunk(piece)
    first, last = chunk.columns(view.infos[name])
    matrix = piece.data.view(-1, last - first)
    at = 0
    for block in chunk.blocks(view, name):
        matrix[at : at + len(block)].copy_(block)
        at += len(block)
    assert at == len(matrix)


def read_weights(folder: Path) -> WeightsFolder:
    """Open a weights folder and check all its files against their checksums, every rank a share of them."""
    opened = WeightsFolder(folder)
    if dist.is_initialized():
        _on_all_ranks(lambda: opened.require_intact(dist.get_rank(), dist.get_world_size()))
    else:
        opened.require_intact()
    return opened


def save_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    model: ModelDescription | None = None,
    dtype: torch.dtype | None = None,
    provenance: Sequence[Mapping[str, Any]] = (),
) -> None:
    """A weights folder from whole tensors or a view of them (one process); an earlier one there is replaced."""
    job = weights_job(
        folder,
        as_view(tensors),
        model,
        Layout(),
        provenance,
        identity={},
        companions_of=None,
        num_layers=1,
        dtype=dtype,
    )
    run_afresh(job)


def save_weights(
    folder: Path,
    model: LocalModel,
    keep: KeyFilter | None = None,
    *,
    provenance: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Publish `model`, or its tensors that `keep` accepts, as a weights folder; all ranks call it.

    `provenance` says how the weights came about, oldest step first.

    The folder appears when all ranks have written their part, and not at all if one fails.
    """
    temporary = _on_first_rank(lambda: _new_temporary(folder))
    try:
        written = _on_all_ranks(lambda: _write_own(temporary, model, keep))
        _on_first_rank(lambda: _publish(temporary, folder, written, _describe(model, keep), provenance))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


_Written = tuple[Sums, dict[str, TensorInfo], dict[str, list[StoredChunk]]]


def _write_own(folder: Path, model: LocalModel, keep: KeyFilter | None) -> _Written:
    """Write the pieces that this rank is the first to have; returns what the index has to know of them."""
    pieces = [piece for piece in sharded_tensors(model, keep) if is_main_replica(piece.replica_id)]
    names = [f"{piece.key}#{'-'.join(map(str, piece.global_offset))}" for piece in pieces]
    data = TensorsInMemory({name: piece.data for name, piece in zip(names, pieces, strict=True)})
    shards = [
        Shard(f"rank-{dist.get_rank():05d}-{number:05d}.safetensors", tensors)
        for number, tensors in enumerate(
            fill_shards((ShardTensor.whole(data, name) for name in names), SHARD_BYTES), start=1
        )
    ]
    sums = {shard.name: shard.write(folder, lambda count: None) for shard in shards}
    file_of = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    infos: dict[str, TensorInfo] = {}
    chunks: dict[str, list[StoredChunk]] = {}
    for name, piece in zip(names, pieces, strict=True):
        infos[piece.key] = TensorInfo(tuple(piece.global_shape), piece.data.dtype)
        chunks.setdefault(piece.key, []).append(StoredChunk(file_of[name], name, _chunk(piece)))
    return sums, infos, chunks


def _describe(model: LocalModel, keep: KeyFilter | None) -> tuple[ModelDescription | None, Layout]:
    first = model_chunks(model)[0]
    config = first.config
    assert isinstance(config, DecoderConfig)
    layout = Layout(config.tensor_model_parallel_size, config.pipeline_model_parallel_size)
    if keep is not None or first.student is not None:
        return None, layout
    shape = ModelShape(
        name="hypenet" if config.hybrid else "qwen3",
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        query_heads=config.num_attention_heads,
        kv_groups=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tied_embeddings,
        rope_theta=config.rope_theta,
        norm_epsilon=config.layernorm_epsilon,
        max_positions=config.max_positions,
    )
    mixers = tuple(config.mixer_types) if config.hybrid else None
    return ModelDescription(shape, mixers, config.logits_scaling_base), layout


def _publish(
    temporary: Path,
    folder: Path,
    written: list[_Written],
    described: tuple[ModelDescription | None, Layout],
    provenance: Sequence[Mapping[str, Any]],
) -> None:
    sums = {name: entry for of_rank, _, _ in written for name, entry in of_rank.items()}
    infos = {key: info for _, of_rank, _ in written for key, info in of_rank.items()}
    chunks: dict[str, list[StoredChunk]] = {}
    for _, _, of_rank in written:
        for key, stored in of_rank.items():
            chunks.setdefault(key, []).extend(stored)
    model, layout = described
    close_folder(temporary, Index(infos, chunks, layout, model, list(provenance)), sums)
    publish_folder(temporary, folder)


def _new_temporary(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    discard_leftovers(folder.parent)
    temporary = temporary_sibling(folder)
    temporary.mkdir()
    return temporary


def _on_all_ranks[T](work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank; all get all results, or all fail if one did: with its error there, RuntimeError
    elsewhere."""
    error: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as problem:
        error = problem
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, None if error is None else str(error)))
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise RuntimeError(f"process {rank} failed: {message}")
    return [outcome for outcome, _ in outcomes]


def _on_first_rank[T](work: Callable[[], T]) -> T:
    """Run `work` in the first process alone; all get its result, or fail if it failed."""
    return _on_all_ranks(lambda: work() if dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]
