"""Jobs that write weights folders: from Qwen3 and HypeNet models, and from one layout to another.

Each function checks everything that can be checked without reading weights, and returns a job that is not yet run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from durable_files import FolderManifest, read_json, write_json
from hypenet_megatron.mixers import DEFAULT_STUDENT
from hypenet_megatron.presets import HYPENET_PRESETS, ModelShape
from hypenet_tools.folder_job import FolderJob
from hypenet_tools.hugging_face.aux_files import copy_aux_files, fingerprint, source_digest
from hypenet_tools.hugging_face.config import ModelDescription
from hypenet_tools.hugging_face.folder import read_model_folder
from hypenet_tools.hugging_face.initialise import initial_hybrid
from hypenet_tools.hugging_face.reference import read_reference_folder
from hypenet_tools.layout import FolderLayout, Rank
from hypenet_tools.open_model import (
    HUGGING_FACE,
    SOURCE_FOLDER,
    TRAINING,
    FolderMetadata,
    OpenedModel,
    manifest_digest,
)
from sharded_tensors.index import OPTIMIZER_PREFIX, TRAINING_FILE, Sums, finish_folder
from sharded_tensors.safetensors_format import DTYPE_CODES
from sharded_tensors.views import TensorView
from sharded_tensors.writer import FileTensor, TensorFile, fill_files, index_of

SHARD_BYTES = 10**9


def weights_job(
    out: Path,
    view: TensorView,
    metadata: FolderMetadata,
    *,
    source: Path | None = None,
    aux_folder: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    training: Mapping[str, Any] | None = None,
) -> FolderJob:
    """Return the job that writes `view` (Megatron names) as a weights folder in the layout of `metadata`.

    ValueError if the layout does not divide the model.

    Args:
        source: folder that the view reads; an interrupted job resumes only if it is unchanged.
        aux_folder: folder from which tokenizer, model card and the like are copied.
        dtype: dtype of the stored tensors; None keeps the dtype of each.
        training: content of TRAINING.json, which makes the folder a training checkpoint.
    """
    by_rank: dict[Rank, list[FileTensor]] = {}
    num_layers = 1
    if metadata.model:
        metadata.layout.require_divides(metadata.model.shape, metadata.model.mixers)
        num_layers = metadata.model.shape.num_layers
    for name, info in view.infos.items():
        for rank, rectangle in metadata.layout.rectangles(name, info, num_layers):
            by_rank.setdefault(rank, []).append(FileTensor(view, name, rectangle, dtype or info.dtype))
    numbered = [
        (rank, number, tensors)
        for rank, of_rank in by_rank.items()
        for number, tensors in enumerate(fill_files(of_rank, max_shard_bytes), start=1)
    ]
    # Write tensor-parallel ranks of the same layers in succession: their columns lie in the same pages of the source.
    numbered.sort(key=lambda entry: (entry[0].pipeline, entry[0].expert, entry[1], entry[0].tensor))
    files = [
        TensorFile(f"t{rank.tensor}-p{rank.pipeline}-e{rank.expert}-{number:05d}.safetensors", tensors)
        for rank, number, tensors in numbered
    ]

    def finish(folder: Path, sums: Sums) -> None:
        if aux_folder is not None:
            copy_aux_files(aux_folder, folder / SOURCE_FOLDER)
        if training is not None:
            assert source is not None
            for problem in FolderManifest.read(source).problems(source):
                raise ValueError(f"{problem}; reshard another checkpoint of the run")
            write_json(folder / TRAINING_FILE, training)
        finish_folder(folder, [(index_of(files), sums)], metadata.to_json())

    identity = {
        "source": None if source is None else str(source.absolute()),
        "source_files": None if source is None else fingerprint(source),
        "layout": asdict(metadata.layout),
        "provenance": list(metadata.provenance),
        "optimizer": training is not None,
        "max_shard_bytes": max_shard_bytes,
    }
    return FolderJob(out, identity, files, finish)


def convert_job(
    source: Path,
    out: Path,
    layout: FolderLayout,
    *,
    hybrid: str | None = None,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
) -> FolderJob:
    """Convert a Qwen3 folder to a weights folder, or with `hybrid` (see `attention_layers_from`) to a new hybrid.

    The hybrid is HALO's stage 0; its gates are drawn from `seed`, which the provenance records. ValueError if `source`
    is not a Qwen3 folder, or the layers or the layout do not fit the model.
    """
    teacher = read_model_folder(source)
    shape = teacher.description.shape
    if teacher.description.mixer_types is not None:
        raise ValueError(f"{source} is a HypeNet already; import it with --from-hypenet")
    view, model = teacher.megatron_view(), teacher.description
    step: dict[str, Any] = {"step": "convert", "from": shape.name, "digest": source_digest(source)}
    if hybrid is not None:
        if shape.experts:
            raise ValueError(f"{source} is a mixture of experts, which can be a teacher but not a hybrid yet")
        layers, base = attention_layers_from(hybrid, shape)
        mixers = shape.hybrid_mixers(layers, DEFAULT_STUDENT)
        view = initial_hybrid(view, shape, mixers, seed)
        model = ModelDescription(shape, mixers, base)
        step |= {"hybrid": list(layers), "seed": seed}
    metadata = FolderMetadata(model, True, layout, [step])
    return weights_job(out, view, metadata, source=source, aux_folder=source, max_shard_bytes=max_shard_bytes)


def import_job(
    source: Path, out: Path, layout: FolderLayout, *, seed: int = 0, max_shard_bytes: int = SHARD_BYTES
) -> FolderJob:
    """Convert a HypeNet folder, a release or one of the reference code (see `reference.py`), to a weights folder."""
    model, view, new_gates = read_reference_folder(source, seed)
    step: dict[str, Any] = {"step": "import", "from": model.shape.name, "digest": source_digest(source)}
    if new_gates:
        step |= {"new_gates": new_gates, "seed": seed}
    metadata = FolderMetadata(model, True, layout, [step])
    return weights_job(out, view, metadata, source=source, aux_folder=source, max_shard_bytes=max_shard_bytes)


def reshard_job(
    source: OpenedModel,
    out: Path,
    layout: FolderLayout,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> FolderJob:
    """Rewrite a weights folder or training checkpoint in another layout or dtype, without building a model.

    A training checkpoint that was opened `with_optimizer` becomes a training checkpoint with bit-identical tensors. It
    has no random states, because those belong to the ranks that saved them and training draws no random numbers. If a
    file of the checkpoint does not match its checksum, the job raises ValueError and publishes nothing.
    """
    if source.kind == HUGGING_FACE:
        raise ValueError(f"{source.folder} is a Hugging Face folder; use halo convert, which also takes a layout")
    if source.metadata.model is None:
        raise ValueError(f"{source.folder} does not say which model it is a part of; reshard the entire model")
    origin = {"name": source.folder.absolute().name, "digest": manifest_digest(source.folder)}
    step = {"step": "reshard", "from": origin["name"], "digest": origin["digest"]}
    training = None
    if source.kind == TRAINING and any(name.startswith(OPTIMIZER_PREFIX) for name in source.stored):
        if dtype is not None:
            raise ValueError(f"{source.folder} has an optimizer; its tensors keep their dtypes")
        training = read_json(source.folder / TRAINING_FILE)
        # No process group has this layout, so that loading does not look for random states.
        training |= {"layout": {"tensor": layout.tensor, "pipeline": layout.pipeline}, "resharded_from": origin}
    if dtype is not None:
        step["dtype"] = DTYPE_CODES[dtype]
    return weights_job(
        out,
        source.stored,
        replace(source.metadata, layout=layout, provenance=[*source.metadata.provenance, step]),
        source=source.folder,
        aux_folder=source.aux_folder,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        training=training,
    )


def attention_layers_from(text: str, shape: ModelShape) -> tuple[tuple[int, ...], float | None]:
    """Parse `--hybrid`, a preset or layers such as 2,3,6, to 0-based attention layers and a logits-scaling base."""
    if text in HYPENET_PRESETS:
        preset = HYPENET_PRESETS[text]
        if preset.shape.num_layers != shape.num_layers or preset.shape.hidden_size != shape.hidden_size:
            raise ValueError(
                f"--hybrid {text} is for {preset.shape.name} ({preset.shape.num_layers} layers, hidden size "
                f"{preset.shape.hidden_size}), but {shape.name} has {shape.num_layers} layers and hidden size "
                f"{shape.hidden_size}; list the attention layers, such as --hybrid 2,3,6"
            )
        return preset.attention_layers, preset.logits_scaling_base
    try:
        layers = tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError:
        raise ValueError(
            f"--hybrid {text} is neither one of {', '.join(HYPENET_PRESETS)} nor layer numbers such as 2,3,6"
        ) from None
    shape.hybrid_mixers(layers, DEFAULT_STUDENT)  # raises if a layer does not exist
    return layers, None
