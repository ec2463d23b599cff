"""Write model folders that transformers loads: HypeNet with its modelling code, and plain Qwen3."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from durable_files import publish_folder, read_json, sha256_file, temporary_sibling, write_json, write_text
from hypenet_megatron.presets import MixerType, ModelShape
from hypenet_tools.hf_config import hypenet_config, qwen3_config
from hypenet_tools.hf_folder import TOKENIZER_FILES
from hypenet_tools.mapping import (
    TensorPlan,
    conversion_plan,
    hugging_face_shapes,
    megatron_shapes,
    require_names,
)
from hypenet_tools.weights import INDEX_FILE, SINGLE_FILE

REMOTE_CODE_FILES = ("configuration_hypenet.py", "cache_hypenet.py", "modeling_hypenet.py")
CHECKSUM_FILE = "SHA256SUMS"
SHARD_BYTES = 5 * 10**9
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def write_hf_folder(
    out: Path,
    megatron_tensors: Mapping[str, Tensor],
    shape: ModelShape,
    mixer_types: Sequence[MixerType],
    *,
    logits_scaling_base: float | None,
    tokenizer_folder: Path,
    dtype: torch.dtype,
    model_card: str,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Publish a hybrid as a HypeNet folder with the modelling code beside the weights
    (`trust_remote_code=True`).

    The folder appears under `out` complete or not at all; an earlier export there is replaced, anything
    else is not. Weights are converted and written one shard at a time, in `dtype`.
    """
    plan = conversion_plan(shape, mixer_types, gated=True)
    config = hypenet_config(shape, mixer_types, logits_scaling_base, DTYPE_NAMES[dtype])
    remote_code = files("hypenet_tools") / "remote_code"
    code = {name: (remote_code / name).read_text() for name in REMOTE_CODE_FILES}
    _write_folder(
        out, megatron_tensors, plan, config, tokenizer_folder, dtype, model_card, max_shard_bytes, code
    )


def write_qwen3_folder(
    out: Path,
    megatron_tensors: Mapping[str, Tensor],
    shape: ModelShape,
    *,
    tokenizer_folder: Path,
    dtype: torch.dtype,
    model_card: str,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Publish a teacher as a plain Qwen3 folder; otherwise as `write_hf_folder`."""
    plan = conversion_plan(shape, shape.teacher_mixers(), gated=False)
    config = qwen3_config(shape, DTYPE_NAMES[dtype])
    _write_folder(
        out, megatron_tensors, plan, config, tokenizer_folder, dtype, model_card, max_shard_bytes, {}
    )


def _write_folder(
    out: Path,
    megatron_tensors: Mapping[str, Tensor],
    plan: Sequence[TensorPlan],
    config: dict[str, Any],
    tokenizer_folder: Path,
    dtype: torch.dtype,
    model_card: str,
    max_shard_bytes: int,
    code: Mapping[str, str],
) -> None:
    if out.exists() and not (out / CHECKSUM_FILE).is_file():
        raise ValueError(
            f"{out} exists and is not an earlier export (it has no {CHECKSUM_FILE}); choose another name"
        )
    require_names(megatron_tensors, megatron_shapes(plan), f"the weights to write to {out}")
    special_ids = special_token_ids(tokenizer_folder, int(config["vocab_size"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_sibling(out)
    folder.mkdir()
    try:
        _write_weights(folder, megatron_tensors, plan, dtype, max_shard_bytes)
        boundary_ids = {
            key: special_ids[key] for key in ("bos_token_id", "eos_token_id") if key in special_ids
        }
        write_json(folder / "config.json", {**config, **boundary_ids})
        write_json(folder / "generation_config.json", special_ids)
        write_text(folder / "README.md", model_card)
        for name, text in code.items():
            write_text(folder / name, text)
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, folder / name)
        sums = [f"{sha256_file(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
        write_text(folder / CHECKSUM_FILE, "".join(sums))
        publish_folder(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_weights(
    folder: Path,
    megatron_tensors: Mapping[str, Tensor],
    plan: Sequence[TensorPlan],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    sizes = {
        name: torch.Size(shape).numel() * dtype.itemsize for name, shape in hugging_face_shapes(plan).items()
    }
    shards = _shards(sizes, max_shard_bytes)
    converted = _convert(megatron_tensors, plan, dtype)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = (
            SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        shard = dict(next(converted) for _ in names)
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    if len(shards) > 1:
        write_json(
            folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        )


def _convert(
    megatron_tensors: Mapping[str, Tensor], plan: Sequence[TensorPlan], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors in the order of the plan, on the CPU."""
    for entry in plan:
        for name, tensor in entry.split(megatron_tensors[entry.megatron].detach()).items():
            yield name, tensor.to("cpu", dtype).contiguous()


def _shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Tensor names in order, cut so that a shard exceeds `max_bytes` only if one tensor alone does."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def special_token_ids(tokenizer_folder: Path, vocab_size: int) -> dict[str, Any]:
    """bos, eos and pad token ids of a tokenizer folder, as generation_config.json wants them.

    A generation_config.json in the folder wins (Qwen3's chat models end at either of two tokens); else the
    names in tokenizer_config.json are looked up. Padding falls back to the end token, which the attention
    mask hides. ValueError when the tokenizer is missing, has more tokens than the model, or names no end
    token.
    """
    tokenizer_file = tokenizer_folder / "tokenizer.json"
    try:
        ids = Tokenizer.from_file(str(tokenizer_file)).get_vocab()
    except Exception as error:  # tokenizers raises nothing more specific
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


_SPECIAL_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
