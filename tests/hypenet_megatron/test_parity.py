"""Megatron models against independent ones: transformers' Qwen3 for the teacher, a plain recurrence for the hybrid."""

import dataclasses

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from halo_jobs.estimate import model_parameters
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel
from hypenet_megatron.presets import HYPENET_PRESETS, QWEN3_SHAPES, ModelShape
from hypenet_tools.model_weights import load_weights
from tests.support.conversions import to_hugging_face, to_megatron
from tests.support.reference_model import hypenet_forward

TIED = ModelShape("tied", 3, 48, 80, 4, 2, 16, 97, tied_embeddings=True)
UNTIED = dataclasses.replace(TIED, name="untied", tied_embeddings=False)
# head_dim is not hidden / heads, and the head count is not a power of two
ODD_HEADS = ModelShape("odd", 2, 40, 56, 6, 3, 8, 64, tied_embeddings=True)
SHAPES = [TIED, UNTIED, ODD_HEADS]


def _randomise_norms(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norm weights start at one, where a forgotten or swapped norm would not show."""
    generator = torch.Generator().manual_seed(3)
    return {
        key: torch.rand(value.shape, generator=generator) + 0.5 if "norm" in key else value
        for key, value in tensors.items()
    }


def _qwen3(shape: ModelShape) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_groups,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=shape.norm_epsilon,
        initializer_range=0.1,
    )
    model = Qwen3ForCausalLM(config).eval()
    state = _randomise_norms(dict(model.state_dict()))
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_teacher_equals_transformers(megatron_cpu, shape):
    reference = _qwen3(shape)
    tensors = dict(reference.state_dict())
    if shape.tied_embeddings:
        tensors.pop("lm_head.weight", None)
    model = DecoderModel(DecoderConfig.from_shape(shape, shape.teacher_mixers())).eval()
    load_weights(to_megatron(tensors, shape, shape.teacher_mixers()), model)
    input_ids = torch.randint(0, shape.vocab_size, (2, 70))
    with torch.no_grad():
        ours = model.logits(model(input_ids)).transpose(0, 1)
        theirs = reference(input_ids).logits
    assert theirs.abs().max() > 0.5
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("scaling_base", [None, 20.0])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_hybrid_equals_the_recurrence(megatron_cpu, shape, scaling_base):
    mixers = shape.hybrid_mixers((1,), "lightning")
    config = DecoderConfig.from_shape(
        shape, mixers, logits_scaling_base=scaling_base, init_method_std=0.1
    )
    model = DecoderModel(config).eval()
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    tensors = _randomise_norms(own)
    load_weights(tensors, model)
    input_ids = torch.randint(0, shape.vocab_size, (2, 70))
    with torch.no_grad():
        ours = model.logits(model(input_ids)).transpose(0, 1)
    exported = to_hugging_face(tensors, shape, mixers)
    expected = hypenet_forward(exported, _reference_config(shape, mixers, scaling_base), input_ids)
    assert expected.abs().max() > 0.5
    assert (ours - expected).abs().max() <= 1e-5
    if scaling_base is not None:
        model.train()
        with torch.no_grad():
            training = model.logits(model(input_ids)).transpose(0, 1)
        assert (training - ours).abs().max() > 1e-4, "logits scaling is for inference only"


def _reference_config(shape, mixers, scaling_base):
    from hypenet_tools.hugging_face.config import hypenet_config

    return hypenet_config(shape, mixers, scaling_base, "float32")


def test_parameter_counts_of_published_sizes():
    """Counted without building: the model cards say 1.72B, 4.02B and 8.19B for the dense teachers."""
    billions = {name: model_parameters(shape, shape.teacher_mixers()) / 1e9 for name, shape in QWEN3_SHAPES.items()}
    assert billions["qwen3-0.6b"] == pytest.approx(0.596, abs=0.001)
    assert billions["qwen3-1.7b"] == pytest.approx(1.72, abs=0.005)
    assert billions["qwen3-4b"] == pytest.approx(4.02, abs=0.005)
    assert billions["qwen3-8b"] == pytest.approx(8.19, abs=0.005)
    assert billions["qwen3-14b"] == pytest.approx(14.77, abs=0.01)
    assert billions["qwen3-32b"] == pytest.approx(32.76, abs=0.01)


@pytest.mark.parametrize("attention_layers", [None, (0, 2)])
def test_counted_parameters_equal_built_ones(megatron_cpu, attention_layers):
    mixers = TIED.hybrid_mixers(attention_layers, "lightning") if attention_layers else TIED.teacher_mixers()
    model = DecoderModel(DecoderConfig.from_shape(TIED, mixers))
    assert sum(parameter.numel() for parameter in model.parameters()) == model_parameters(TIED, mixers)


def test_presets_are_a_quarter_attention():
    for preset in HYPENET_PRESETS.values():
        assert len(preset.attention_layers) == preset.shape.num_layers // 4
        mixers = preset.shape.hybrid_mixers(preset.attention_layers, "lightning")
        assert mixers.count("attn") == preset.shape.num_layers // 4
