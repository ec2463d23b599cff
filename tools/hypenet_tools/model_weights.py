"""Loads and saves weights folders of models in memory. At any layout, each rank reads and writes only its own part."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from durable_files import publish_folder, temporary_folder
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import LocalModel, model_chunks
from hypenet_megatron.presets import ModelShape
from hypenet_tools.convert import SHARD_BYTES, weights_job
from hypenet_tools.folder_job import run_from_scratch
from hypenet_tools.hugging_face.config import ModelDescription
from hypenet_tools.layout import FolderLayout
from hypenet_tools.open_model import FolderMetadata
from sharded_tensors.index import Index, Sums, finish_folder, is_weight
from sharded_tensors.megatron import fill_pieces, model_pieces, owned_tensors
from sharded_tensors.ranks import on_all_ranks, on_first_rank
from sharded_tensors.reader import NameFilter, StoredTensors
from sharded_tensors.views import LocalRectangles, as_view
from sharded_tensors.writer import FileTensor, TensorFile, fill_files, write_files


def load_weights(
    source: Path | Mapping[str, Tensor],
    model: LocalModel,
    *,
    rename: Callable[[str], str] | None = None,
) -> None:
    """Load weights into this rank's part of `model`, converted to the model's dtype.

    `source` is a weights folder, a training checkpoint, or global tensors in memory or as a view. `rename` maps a
    tensor's name in the model to its stored name, or to "" to skip it. ValueError if a file is damaged, or a tensor is
    missing, unexpected or of another shape.
    """
    view = read_weights(source) if isinstance(source, Path) else as_view(source)
    holder = source if isinstance(source, Path) else "what is to be loaded"
    pieces = model_pieces(model)
    if rename is None and parallel_state.get_pipeline_model_parallel_world_size() == 1:
        left_over = sorted(view.infos.keys() - {piece.key for piece in pieces})
        if left_over:
            raise ValueError(f"{holder}: the model has no tensor {left_over[0]} ({len(left_over)} left over)")
    fill_pieces(pieces, view, holder, rename)


def read_weights(folder: Path) -> StoredTensors:
    """Open the weights of a weights folder or training checkpoint after verifying all checksums.

    Each rank verifies a share of the files. ValueError if one of them is damaged.
    """
    stored = StoredTensors(folder, is_weight)
    if dist.is_initialized():
        on_all_ranks(lambda: stored.require_intact(dist.get_rank(), dist.get_world_size()))
    else:
        stored.require_intact()
    return stored


def save_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    model: ModelDescription | None = None,
    dtype: torch.dtype | None = None,
    provenance: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Publish global tensors, or a view of them, from one process as a weights folder. Replaces an earlier folder.

    `model` describes the model that the tensors make up; None if they are only a part of one.
    """
    metadata = FolderMetadata(model, model is not None, FolderLayout(), list(provenance))
    run_from_scratch(weights_job(folder, as_view(tensors), metadata, dtype=dtype))


def save_weights(
    folder: Path,
    model: LocalModel,
    keep: NameFilter | None = None,
    *,
    provenance: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Publish `model`, or those of its tensors that `keep` accepts, as a weights folder. All ranks call this.

    `provenance` lists how the weights were made, oldest step first. The folder appears once all ranks have written
    their parts. If a rank fails, all ranks raise and nothing is published.
    """
    temporary = on_first_rank(lambda: temporary_folder(folder))
    metadata = describe(model, keep, provenance).to_json()

    def publish(written: list[tuple[Index, Sums]]) -> None:
        finish_folder(temporary, written, metadata)
        publish_folder(temporary, folder)

    try:
        written = on_all_ranks(lambda: _write_own(temporary, model, keep))
        on_first_rank(lambda: publish(written))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_own(folder: Path, model: LocalModel, keep: NameFilter | None) -> tuple[Index, Sums]:
    """Write the rectangles whose main replica this rank holds."""
    infos, tensors = owned_tensors(model_pieces(model, keep))
    view = LocalRectangles(infos, tensors)
    groups = fill_files([FileTensor(view, *key, infos[key[0]].dtype) for key in tensors], SHARD_BYTES)
    files = [
        TensorFile(f"rank-{dist.get_rank():05d}-{number:05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]
    return write_files(folder, files)


def describe(
    model: LocalModel, keep: NameFilter | None, provenance: Sequence[Mapping[str, Any]] = ()
) -> FolderMetadata:
    """The metadata of a folder with those tensors of `model` that `keep` accepts."""
    first = model_chunks(model)[0]
    config = first.config
    assert isinstance(config, DecoderConfig)
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
    return FolderMetadata(
        ModelDescription(shape, tuple(config.mixer_types) if config.hybrid else None, config.logits_scaling_base),
        keep is None and first.student is None,
        FolderLayout(config.tensor_model_parallel_size, config.pipeline_model_parallel_size),
        list(provenance),
    )
