"""Logits of models on disk, in fp32: Hugging Face folders by transformers on the CPU, our folders by Megatron.

A HypeNet is run by the modelling code of this package, never by code from its folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Comparison:
    """Differences of logits over all positions of all prompts. `largest` is the largest magnitude of any logit."""

    max_difference: float
    largest: float
    cosine: float
    top_1_agreement: float
    positions: int


def prompts(vocab_size: int) -> Tensor:
    """Token ids [4, 48] that depend only on the size of the vocabulary; there may be no tokenizer."""
    return torch.randint(vocab_size, (PROMPTS, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))


def compare_logits(a: OpenedModel, b: OpenedModel) -> Comparison | str:
    """Run both models on the same prompts, one after the other. Returns a reason if one does not fit into memory."""
    needed = max(model.stored.elements for model in (a, b)) * 4 * _MEMORY_FACTOR
    available = psutil.virtual_memory().available
    if needed > available:
        return f"not computed: takes {needed / 2**30:.0f} GiB of memory, {available / 2**30:.0f} GiB are available"
    one, other = logits(a), logits(b)
    return Comparison(
        max_difference=float((one - other).abs().max()),
        largest=float(one.abs().max()),
        cosine=float(torch.nn.functional.cosine_similarity(one, other, dim=-1).mean()),
        top_1_agreement=float((one.argmax(-1) == other.argmax(-1)).float().mean()),
        positions=one.shape[0] * one.shape[1],
    )


@torch.no_grad()
def logits(opened: OpenedModel) -> Tensor:
    """Logits [prompts, tokens, vocabulary], fp32."""
    ids = prompts(opened.model.shape.vocab_size)
    if opened.kind == HUGGING_FACE:
        return _by_transformers(opened.folder, opened, ids)
    if opened.model.shape.experts:  # our Megatron model is dense
        with tempfile.TemporaryDirectory() as folder:
            _write_plain(Path(folder), opened)
            return _by_transformers(Path(folder), opened, ids)
    with _one_process() as device:
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
    shape = opened.model.shape
    config = DecoderConfig.from_shape(
        shape,
        opened.model.mixers,
        logits_scaling_base=opened.model.logits_scaling_base,
    )
    model = DecoderModel(config).to(device).eval()
    load_weights(opened.stored, model)
    return model.logits(model(ids.to(device))).transpose(0, 1).float().cpu()


def _write_plain(folder: Path, opened: OpenedModel) -> None:
    """Weights and config in Hugging Face layout, without tokenizer or card."""
    view = opened.hugging_face()
    TensorFile(SINGLE_FILE, [FileTensor.entire(view, name) for name in view]).write(folder)
    write_json(folder / "config.json", qwen3_config(opened.model.shape, "float32"))


@contextmanager
def _one_process() -> Iterator[torch.device]:
    if dist.is_initialized():
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return
    with model_parallel() as device:
        yield device
