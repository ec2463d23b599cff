"""Writes model folders that transformers loads: a HypeNet with its modelling code, or a plain Qwen3."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from durable_files import read_json, sha256_file, write_json, write_text
from hypenet_megatron.presets import ModelShape
from hypenet_tools.folder_job import FolderJob, run_from_scratch
from hypenet_tools.hugging_face.aux_files import CHECKSUM_FILE, GENERATION_CONFIG, MODEL_CARD, aux_files
from hypenet_tools.hugging_face.config import ModelDescription, hypenet_config, qwen3_config
from hypenet_tools.hugging_face.mapping_views import hugging_face_view
from hypenet_tools.hugging_face.weights import INDEX_FILE, SINGLE_FILE
from hypenet_tools.remote_code import modeling_files
from sharded_tensors.index import Sums
from sharded_tensors.views import TensorView, as_view
from sharded_tensors.writer import FileTensor, TensorFile, fill_files

SHARD_BYTES = 5 * 10**9
_SPECIAL_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def release_job(
    out: Path,
    view: TensorView,
    model: ModelDescription,
    *,
    tokenizer_folder: Path,
    model_card: str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    identity: Mapping[str, Any] | None = None,
) -> FolderJob:
    """Return the job that writes Megatron tensors as a Hugging Face folder.

    A hybrid's folder includes its modelling code (`trust_remote_code=True`); a teacher's is a plain Qwen3. Tokenizer,
    chat template, generation config and licence come from `tokenizer_folder`. With `dtype` None, every tensor keeps its
    dtype. ValueError if tensors are missing or unexpected, or the tokenizer does not fit the model.
    """
    weights = hugging_face_view(view, model.plan, f"the weights to write to {out}")
    tensors = [FileTensor.entire(weights, name, dtype) for name in weights]
    filled = fill_files(tensors, max_shard_bytes)
    names = [
        SINGLE_FILE if len(filled) == 1 else f"model-{number:05d}-of-{len(filled):05d}.safetensors"
        for number in range(1, len(filled) + 1)
    ]
    tensor_files = [TensorFile(name, content) for name, content in zip(names, filled, strict=True)]
    special_ids = special_token_ids(tokenizer_folder, model.shape.vocab_size)
    small_files = _small_files(model, tensors, tokenizer_folder, special_ids)

    def finish(folder: Path, sums: Sums) -> None:
        if len(tensor_files) > 1:
            total = sum(file.nbytes for file in tensor_files)
            weight_map = {tensor.name: file.name for file in tensor_files for tensor in file.tensors}
            write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for name, content in small_files.items():
            write_json(folder / name, content)
        write_text(folder / MODEL_CARD, model_card)
        if model.mixer_types is not None:
            for name, text in modeling_files(model.mixer_types).items():
                write_text(folder / name, text)
        for path in aux_files(tokenizer_folder):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
        digests = {
            path.name: sums[path.name][1] if path.name in sums else sha256_file(path)
            for path in folder.iterdir()
            if path.name != CHECKSUM_FILE
        }
        lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
        write_text(folder / CHECKSUM_FILE, "".join(lines))

    return FolderJob(out, {**(identity or {}), "max_shard_bytes": max_shard_bytes}, tensor_files, finish)


def _small_files(
    model: ModelDescription,
    tensors: Sequence[FileTensor],
    tokenizer_folder: Path,
    special_ids: Mapping[str, Any],
) -> dict[str, Any]:
    """Contents of config.json and generation_config.json. The config's dtype is that of most elements."""
    elements: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        elements[tensor.dtype] += tensor.rectangle.elements
    dtype = str(elements.most_common(1)[0][0]).removeprefix("torch.")
    if model.mixer_types is None:
        config = qwen3_config(model.shape, dtype)
    else:
        config = hypenet_config(model.shape, model.mixer_types, model.logits_scaling_base, dtype)
    boundary_ids = {key: special_ids[key] for key in ("bos_token_id", "eos_token_id") if key in special_ids}
    generation = tokenizer_folder / GENERATION_CONFIG
    settings = read_json(generation) if generation.is_file() else {}
    return {"config.json": {**config, **boundary_ids}, GENERATION_CONFIG: {**settings, **special_ids}}


def write_hf_folder(
    out: Path,
    megatron_tensors: Mapping[str, Tensor],
    shape: ModelShape,
    mixer_types: Sequence[str] | None,
    *,
    logits_scaling_base: float | None = None,
    tokenizer_folder: Path,
    dtype: torch.dtype | None,
    model_card: str,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Publish a Hugging Face folder of a hybrid, or of a teacher if `mixer_types` is None.

    The folder appears at `out` complete or not at all and replaces an earlier export. ValueError if `out` is anything
    else.
    """
    if out.exists() and not (out / CHECKSUM_FILE).is_file():
        raise ValueError(
            f"{out} exists and is not an earlier export (it has no {CHECKSUM_FILE}); choose another name"
        )
    model = ModelDescription(shape, None if mixer_types is None else tuple(mixer_types), logits_scaling_base)
    run_from_scratch(
        release_job(
            out,
            as_view(megatron_tensors),
            model,
            tokenizer_folder=tokenizer_folder,
            model_card=model_card,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )
    )


def special_token_ids(tokenizer_folder: Path, vocab_size: int) -> dict[str, Any]:
    """The bos, eos and pad token ids of a tokenizer folder, with the keys of generation_config.json.

    A generation_config.json in the folder takes precedence over the names in tokenizer_config.json, because Qwen3's
    chat models end at either of two tokens. The pad token defaults to the end token, which the attention mask hides.
    ValueError if the tokenizer is missing, has more tokens than the model, or names no end token.
    """
    tokenizer_file = tokenizer_folder / "tokenizer.json"
    try:
        ids = Tokenizer.from_file(str(tokenizer_file)).get_vocab()
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(
            f"{tokenizer_file} is missing or not a tokenizer ({error}); fetch it again"
        ) from None
    if max(ids.values()) >= vocab_size:
        raise ValueError(
            f"{tokenizer_file} has token ids up to {max(ids.values())} but the model's vocabulary has "
            f"{vocab_size} entries; give the tokenizer the model was trained with"
        )
    found: dict[str, Any] = {}
    config = read_json(tokenizer_folder / "tokenizer_config.json")
    for kind in ("bos", "eos", "pad"):
        token = config.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            found[f"{kind}_token_id"] = ids[text]
    generation = tokenizer_folder / "generation_config.json"
    if generation.is_file():
        found |= {key: value for key, value in read_json(generation).items() if key in _SPECIAL_KEYS}
    if "eos_token_id" not in found:
        raise ValueError(f"{tokenizer_folder / 'tokenizer_config.json'} names no known eos_token; add it")
    end = found["eos_token_id"]
    found.setdefault("pad_token_id", end[0] if isinstance(end, list) else end)
    return found

