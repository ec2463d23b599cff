"""Computes fp32 logits of models on disk: Hugging Face folders with transformers on the CPU, others with Megatron.

A HypeNet runs with the modelling code of this package, never with code from its folder.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from durable_files import write_json
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel
from hypenet_megatron.runtime import model_parallel
from hypenet_tools.hugging_face.config import qwen3_config
from hypenet_tools.hugging_face.weights import SINGLE_FILE
from hypenet_tools.model_weights import load_weights
from hypenet_tools.open_model import HUGGING_FACE, OpenedModel
from sharded_tensors.writer import FileTensor, TensorFile

PROMPTS, PROMPT_LENGTH = 4, 48
_MEMORY_FACTOR = 1.3  # for activations and temporary copies during loading


def compare_logits(a: OpenedModel, b: OpenedModel) -> dict[str, Any]:
    """Compare logits at all positions of the same prompts; `largest` is the largest magnitude of those of `a`.

    If a model does not fit into memory, the result has only "skipped", the reason.
    """
    needed = max(model.stored.elements for model in (a, b)) * 4 * _MEMORY_FACTOR
    available = psutil.virtual_memory().available
    if needed > available:
        reason = f"takes {needed / 2**30:.0f} GiB of memory, {available / 2**30:.0f} GiB are available"
        return {"skipped": f"not computed: {reason}"}
    one, other = logits(a), logits(b)
    return {
        "max_difference": float((one - other).abs().max()),
        "largest": float(one.abs().max()),
        "cosine": float(torch.nn.functional.cosine_similarity(one, other, dim=-1).mean()),
        "top_1_agreement": float((one.argmax(-1) == other.argmax(-1)).float().mean()),
        "positions": one.shape[0] * one.shape[1],
    }


@torch.no_grad()
def logits(opened: OpenedModel) -> Tensor:
    """Compute fp32 logits [prompts, tokens, vocabulary] of the fixed prompts."""
    # Prompts depend only on the size of the vocabulary, because there may be no tokenizer.
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(opened.model.shape.vocab_size, (PROMPTS, PROMPT_LENGTH), generator=generator)
    if opened.kind == HUGGING_FACE:
        return _by_transformers(opened.folder, opened, ids)
    if opened.model.shape.experts:  # DecoderModel is dense
        with tempfile.TemporaryDirectory() as folder:
            _write_plain(Path(folder), opened)
            return _by_transformers(Path(folder), opened, ids)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with nullcontext(device) if dist.is_initialized() else model_parallel() as device:
        return _by_megatron(opened, ids, device)


def _by_transformers(folder: Path, opened: OpenedModel, ids: Tensor) -> Tensor:
    from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

    from hypenet_tools.remote_code.modeling_hypenet import HypeNetForCausalLM

    kind = Qwen3MoeForCausalLM if opened.model.shape.experts else Qwen3ForCausalLM
    if opened.model.mixer_types is not None:
        kind = HypeNetForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    return model(ids).logits.float()


def _by_megatron(opened: OpenedModel, ids: Tensor, device: torch.device) -> Tensor:
    base = opened.model.logits_scaling_base
    config = DecoderConfig.from_shape(opened.model.shape, opened.model.mixers, logits_scaling_base=base)
    model = DecoderModel(config).to(device).eval()
    load_weights(opened.stored, model)
    return model.logits(model(ids.to(device))).transpose(0, 1).float().cpu()


def _write_plain(folder: Path, opened: OpenedModel) -> None:
    """Write weights and config in Hugging Face layout, without tokenizer or model card."""
    view = opened.hugging_face()
    TensorFile(SINGLE_FILE, [FileTensor.entire(view, name) for name in view]).write(folder)
    write_json(folder / "config.json", qwen3_config(opened.model.shape, "float32"))
