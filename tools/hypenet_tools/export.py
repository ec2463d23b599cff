"""Exports any folder with an entire model to a Hugging Face folder that can be uploaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hypenet_megatron.presets import ATTENTION
from hypenet_tools.folder_job import FolderJob
from hypenet_tools.hugging_face.aux_files import MODEL_CARD, fingerprint, licence_of
from hypenet_tools.hugging_face.config import ModelDescription, mixers_in_use
from hypenet_tools.open_model import OpenedModel
from hypenet_tools.release import SHARD_BYTES, release_job
from sharded_tensors.safetensors_format import DTYPE_CODES

_UNCHANGED_BY = {"convert", "import", "reshard"}


def export_job(
    source: OpenedModel,
    out: Path,
    *,
    tokenizer_folder: Path | None = None,
    logits_scaling_base: float | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> FolderJob:
    """Return the job that writes `source` as a Hugging Face folder.

    The tokenizer comes from `tokenizer_folder`, by default the source. A model that was only converted, imported or
    resharded keeps its model card; any other gets a card that lists its provenance. `logits_scaling_base` replaces the
    hybrid's base. ValueError if the tokenizer is missing or the source is a teacher and has no logits scaling.
    """
    model = source.model
    aux_folder = tokenizer_folder or source.aux_folder
    if not (aux_folder / "tokenizer.json").is_file():
        raise ValueError(f"{aux_folder} has no tokenizer.json; give a folder that has one with --tokenizer")
    if logits_scaling_base is not None:
        if model.mixer_types is None:
            raise ValueError(f"{source.folder} is a teacher, which has no logits scaling; leave --logits-scaling out")
        model = replace(model, logits_scaling_base=logits_scaling_base)
    options = {
        "tokenizer": str(aux_folder.absolute()),
        "logits_scaling_base": model.logits_scaling_base,
        "dtype": None if dtype is None else DTYPE_CODES[dtype],
    }
    return release_job(
        out,
        source.megatron(),
        model,
        tokenizer_folder=aux_folder,
        model_card=_card(source, model, aux_folder),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        identity={
            "source": str(source.folder.absolute()),
            "source_files": fingerprint(source.folder),
            "options": options,
        },
    )


def _card(source: OpenedModel, model: ModelDescription, aux_folder: Path) -> str:
    card = source.aux_folder / MODEL_CARD
    changed = [
        step
        for step in source.metadata.provenance
        if step["step"] not in _UNCHANGED_BY or "hybrid" in step or "new_gates" in step
    ]
    if card.is_file() and not changed:
        return card.read_text()
    return _new_card(source, model, licence_of(aux_folder))


def _new_card(source: OpenedModel, model: ModelDescription, licence: str) -> str:
    origin = next((str(step["from"]) for step in source.metadata.provenance if "from" in step), model.shape.name)
    kind = "Qwen3 model" if model.mixer_types is None else "HypeNet hybrid"
    lines = [
        "---",
        f"license: {licence}",
        f"base_model: {origin}",
        "library_name: transformers",
        "---",
        "",
        f"# {kind} from {origin}",
        "",
        f"{model.shape.num_layers} layers, hidden size {model.shape.hidden_size}, {source.stored.elements:,} "
        f"parameters. The licence is that of the base model, {origin}.",
    ]
    if model.mixer_types is not None:
        attention = [str(n) for n, name in enumerate(model.mixer_types) if name == ATTENTION]
        others = [spec.title for spec in mixers_in_use(model.mixer_types) if spec.name != ATTENTION]
        lines += [
            "",
            f"Softmax attention in layers {', '.join(attention) or 'none'} (from 0); the others are "
            f"{', '.join(others) or 'none'}. The folder contains its own modelling code (hypenet-megatron, Apache "
            "License 2.0), so loading it needs `trust_remote_code=True`.",
        ]
    if any("hybrid" in step for step in source.metadata.provenance):
        lines += ["", "**Not trained**: mixers are copies of the teacher's, output gates are random."]
    lines += ["", "## How it was made", ""]
    lines += [f"- {_sentence(step)}" for step in source.metadata.provenance] or ["- not recorded"]
    return "\n".join(lines) + "\n"


def _sentence(step: Any) -> str:
    extras = [f"{key} {value}" for key, value in step.items() if key not in ("step", "from", "digest")]
    text = f"{step['step']} from {step['from']}" if "from" in step else str(step["step"])
    digest = (
        f" (SHA-256 of its {step['digest']['of']}: `{step['digest']['sha256']}`)" if "digest" in step else ""
    )
    return text + "".join(f", {extra}" for extra in extras) + digest
