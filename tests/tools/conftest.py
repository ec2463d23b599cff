"""Tiny random models and a tiny tokenizer for the conversion tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hypenet_megatron.presets import ModelShape
from hypenet_tools.hugging_face.mapping import conversion_plan, megatron_shapes, split_name
from hypenet_tools.release import write_hf_folder

RandomTensors = Callable[..., dict[str, Tensor]]


@pytest.fixture
def random_tensors() -> RandomTensors:
    """Megatron tensors of a random model: matrices of a scale that keeps logits lively, norms around one."""

    def make(shape: ModelShape, mixers: tuple[str, ...]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = megatron_shapes(conversion_plan(shape, mixers))

        def drawn(name: str) -> tuple[int, bool]:
            """Fused projections and output norms come last in a layer: bounds were set with these values."""
            layer = -1 if name.startswith("embedding.") else split_name(name)[0]
            late = name.endswith(("linear_qkv.weight", "o_norm.weight"))
            return (shape.num_layers if layer is None else layer, late)

        tensors = {}
        for name in sorted(shapes, key=drawn):
            noise = torch.randn(shapes[name], generator=generator)
            tensors[name] = 1 + 0.1 * noise if len(shapes[name]) == 1 else 0.15 * noise
        return tensors

    return make


@pytest.fixture
def hf_folder(random_tensors: RandomTensors, tokenizer_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a random model as a Hugging Face folder; `mixers` None means a teacher."""

    def write(
        name: str,
        shape: ModelShape,
        mixers: tuple[str, ...] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        max_shard_bytes: int = 10**9,
    ) -> Path:
        tensors = random_tensors(shape, mixers or shape.teacher_mixers())
        write_hf_folder(
            tmp_path / name,
            tensors,
            shape,
            mixers,
            logits_scaling_base=None if mixers is None else 7.0,
            tokenizer_folder=tokenizer_folder,
            dtype=dtype,
            model_card="---\nlicense: apache-2.0\n---\n# Tiny\n",
            max_shard_bytes=max_shard_bytes,
        )
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level tokenizer of 90 words, the last of which ends a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {f"w{i}": i for i in range(88)} | {"<unk>": 88}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 89,
                "content": "<end>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
