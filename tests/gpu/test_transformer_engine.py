"""Transformer Engine's modules against the local ones: same weights, same logits, same files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel
from hypenet_megatron.runtime import model_parallel
from hypenet_tools.model_weights import load_weights, save_weights
from tests.support.tiny_models import HYBRID, TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]

SHAPE = replace(TINY, hidden_size=256, ffn_hidden_size=512, head_dim=64)
TEACHER = SHAPE.teacher_mixers()
# Relative L2 of logits.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def device():
    pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    with model_parallel(seed=1) as device:
        yield device


def _model(
    mixers: tuple[str, ...], dtype: torch.dtype, implementation: str, device: torch.device
) -> DecoderModel:
    config = DecoderConfig.from_shape(
        SHAPE,
        mixers,
        hybrid="lightning" in mixers,
        dtype=dtype,
        logits_scaling_base=9.0 if "lightning" in mixers else None,
        transformer_impl=implementation,
    )
    return DecoderModel(config).to(device).eval()


@torch.no_grad()
def _logits(model: DecoderModel) -> Tensor:
    ids = torch.randint(88, (2, 200), generator=torch.Generator().manual_seed(5)).cuda()
    return model.logits(model(ids)).double()


@pytest.mark.parametrize("written_by", ["local", "transformer_engine"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("mixers", [TEACHER, HYBRID], ids=["teacher", "hybrid"])
def test_one_path_loads_what_the_other_wrote(device, tmp_path, mixers, dtype, written_by):
    read_by = "transformer_engine" if written_by == "local" else "local"
    torch.manual_seed(3)
    writer = _model(mixers, dtype, written_by, device)
    save_weights(tmp_path / "weights", writer)
    torch.manual_seed(4)
    reader = _model(mixers, dtype, read_by, device)
    load_weights(tmp_path / "weights", reader)
    theirs = dict(reader.named_parameters())
    for name, weight in writer.named_parameters():
        assert torch.equal(weight, theirs[name]), name
    found, expected = _logits(reader), _logits(writer)
    assert float((found - expected).norm() / expected.norm()) <= BOUNDS[dtype]
