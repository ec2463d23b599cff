"""Models into weights folders: from Hugging Face, from a released HypeNet, and from one layout to another.

Each function checks everything that can be checked without reading weights, and returns the job that does the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hypenet_megatron.mixers import DEFAULT_STUDENT
from hypenet_megatron.presets import HYPENET_PRESETS, ModelShape
from hypenet_tools.folder_job import Job, Sums
from hypenet_tools.hugging_face.aux_files import copy_companions, fingerprint, source_digest
from hypenet_tools.hugging_face.config import ModelDescription
from hypenet_tools.hugging_face.folder import read_model_folder
from hypenet_tools.hugging_face.initialise import initial_hybrid
from hypenet_tools.hugging_face.reference import read_reference_folder
from hypenet_tools.layout import Layout, Rank
from hypenet_tools.open_model import HUGGING_FACE, OpenedModel, manifest_digest
from hypenet_tools.weights_folder import SOURCE_FOLDER, Index, close_folder
from sharded_tensors.safetensors_format import DTYPE_CODES
from sharded_tensors.views import TensorView
from sharded_tensors.writer import Shard, ShardTensor, fill_shards

SHARD_BYTES = 10**9


def weights_job(
    out: Path,
    view: TensorView,
    model: ModelDescription | None,
    layout: Layout,
    provenance: Sequence[Mapping[str, Any]],
    *,
    identity: Mapping[str, Any],
    companions_of: Path | None,
    num_layers: int,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Job:
    """The job that writes a view's tensors (Megatron names) as a weights folder in `layout`.

    `dtype` None keeps every tensor's own. `companions_of` is a folder with a tokenizer and the like, or None.
    """
    by_rank: dict[Rank, list[ShardTensor]] = {}
    for name, info in view.infos.items():
        chunks = layout.chunks(name, info, num_layers)
        for number, (rank, chunk) in enumerate(chunks):
            stored = name if len(chunks) == 1 else f"{name}#{number}"
            tensor = ShardTensor(stored, view, name, chunk, dtype or info.dtype)
            by_rank.setdefault(rank, []).append(tensor)
    numbered = [
        (rank, number, tensors)
        for rank, of_rank in by_rank.items()
        for number, tensors in enumerate(fill_shards(of_rank, max_shard_bytes), start=1)
    ]
    # Tensor-parallel ranks of the same layers follow one another: their columns lie in the same pages of the source.
    numbered.sort(key=lambda entry: (entry[0].pipeline, entry[0].expert, entry[1], entry[0].tensor))
    shards = [
        Shard(f"t{rank.tensor}-p{rank.pipeline}-e{rank.expert}-{number:05d}.safetensors", tensors)
        for rank, number, tensors in numbered
    ]
    index = Index.of_shards(shards, layout, model, provenance)

    def finish(folder: Path, sums: Sums) -> None:
        if companions_of is not None:
            copy_companions(companions_of, folder / SOURCE_FOLDER)
        close_folder(folder, index, sums)

    return Job(out, {**identity, "max_shard_bytes": max_shard_bytes}, shards, finish)


def convert_job(
    source: Path,
    out: Path,
    layout: Layout,
    *,
    hybrid: str | None = None,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
) -> Job:
    """A Qwen3 folder as a weights folder; with `hybrid` (see `attention_layers_from`) as the hybrid that
    stage 0 makes of it.

    Gates are drawn from `seed`, which the provenance records. ValueError in one sentence when the folder, the layers
    or the layout will not do.
    """
    teacher = read_model_folder(source)
    shape = teacher.shape
    if teacher.mixer_types is not None:
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
    layout.require_divides(shape, model.mixers)
    return weights_job(
        out,
        view,
        model,
        layout,
        [step],
        identity=_identity(source, layout, step),
        companions_of=source,
        num_layers=shape.num_layers,
        max_shard_bytes=max_shard_bytes,
    )


def import_job(
    source: Path, out: Path, layout: Layout, *, seed: int = 0, max_shard_bytes: int = SHARD_BYTES
) -> Job:
    """A HypeNet folder, released or of the reference's training (see `reference.py`), as a weights folder."""
    hybrid = read_reference_folder(source, seed)
    shape = hybrid.description.shape
    layout.require_divides(shape, hybrid.description.mixers)
    step: dict[str, Any] = {"step": "import", "from": shape.name, "digest": source_digest(source)}
    if hybrid.new_gates:
        step |= {"new_gates": hybrid.new_gates, "seed": seed}
    return weights_job(
        out,
        hybrid.megatron_view,
        hybrid.description,
        layout,
        [step],
        identity=_identity(source, layout, step),
        companions_of=source,
        num_layers=shape.num_layers,
        max_shard_bytes=max_shard_bytes,
    )


def reshard_job(
    source: OpenedModel,
    out: Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Job:
    """A weights folder, or a training checkpoint's weights, in another layout or dtype. No model is built."""
    model = source.whole
    if source.kind == HUGGING_FACE:
        raise ValueError(
            f"{source.folder} is a Hugging Face folder; use halo convert, which takes a layout too"
        )
    layout.require_divides(model.shape, model.mixers)
    step: dict[str, Any] = {
        "step": "reshard",
        "from": source.folder.absolute().name,
        "digest": manifest_digest(source.folder),
    }
    if dtype is not None:
        step["dtype"] = DTYPE_CODES[dtype]
    return weights_job(
        out,
        source.stored,
        model,
        layout,
        [*source.provenance, step],
        identity=_identity(source.folder, layout, step),
        companions_of=source.companions,
        num_layers=model.shape.num_layers,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def _identity(source: Path, layout: Layout, step: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "source": str(source.absolute()),
        "source_files": fingerprint(source),
        "layout": [layout.tensor, layout.pipeline, layout.expert],
        "step": dict(step),
    }


def attention_layers_from(text: str, shape: ModelShape) -> tuple[tuple[int, ...], float | None]:
    """What `--hybrid` names: 0-based attention layers and logits-scaling base of a preset, or layers such as 2,3,6."""
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
    shape.hybrid_mixers(layers, DEFAULT_STUDENT)  # refuses layers that do not exist
    return layers, None
