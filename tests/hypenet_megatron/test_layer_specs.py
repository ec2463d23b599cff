"""What models are built of: config errors, checkpoint keys, the routes of stage 1, the Transformer Engine path."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import nn

from hypenet_megatron.alignment import Route
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.mixers.softmax_layer import SoftmaxAttentionCore
from hypenet_megatron.model import DecoderModel
from hypenet_megatron.norms import RMSNorm
from hypenet_megatron.presets import ModelShape
from hypenet_tools.model_weights import load_weights, save_weights
from sharded_tensors.megatron import model_pieces

SHAPE = ModelShape("tiny", 3, 48, 80, 4, 2, 16, 96, tied_embeddings=True)
TEACHER = SHAPE.teacher_mixers()
HYBRID = SHAPE.hybrid_mixers((1,), "lightning")


def _config(*, hybrid: bool = False, shape: ModelShape = SHAPE, **options: Any) -> DecoderConfig:
    return DecoderConfig.from_shape(
        shape, HYBRID if hybrid else TEACHER, init_method_std=0.15, **options
    )


@torch.no_grad()
def _logits(model: DecoderModel, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ids))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(SHAPE.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def teacher(megatron_cpu) -> DecoderModel:
    return DecoderModel(_config()).eval()


@pytest.fixture
def aligned(teacher) -> DecoderModel:
    """The teacher's weights with random students beside them."""
    model = DecoderModel(_config(), student="lightning").eval()
    own = {f".{part}": f".teacher.{part}" for part in ("linear_", "q_layernorm", "k_layernorm")}
    renamed = {}
    for key, value in teacher.state_dict().items():
        for plain, nested in own.items():
            key = key.replace(f".self_attention{plain}", f".self_attention{nested}")
        renamed[key] = value
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all(".student." in key for key in missing)
    return model


@pytest.mark.parametrize("mixers", [(), TEACHER[:2], (*TEACHER, "attn")])
def test_one_mixer_per_layer(mixers):
    with pytest.raises(ValueError, match=rf"names {len(mixers)} layers but the model has 3; give one mixer"):
        DecoderConfig.from_shape(SHAPE, mixers)


def test_unknown_mixer():
    """Hugging Face calls it lightning-attn; built as attention it would train without a word."""
    with pytest.raises(ValueError, match="there is no mixer 'lightning-attn'; did you mean 'lightning'"):
        DecoderConfig.from_shape(SHAPE, ("attn", "lightning-attn", "attn"))


def test_shapes_that_cannot_be():
    with pytest.raises(ValueError, match="query_heads 4 is not a multiple of kv_groups 3"):
        replace(SHAPE, kv_groups=3)
    with pytest.raises(ValueError, match="head_dim 15 must be even for RoPE"):
        replace(SHAPE, head_dim=15)
    with pytest.raises(ValueError, match=r"attention layers \[3, -1\] do not exist in tiny with 3 layers"):
        SHAPE.hybrid_mixers((0, 3, -1), "lightning")


def test_config_of_each_layer():
    config = _config(hybrid=True)
    lightning, attention = config.get_config_for_layer(1), config.get_config_for_layer(2)
    assert (lightning.no_rope_freq[0], attention.no_rope_freq[1]) == (0, 1)
    assert (lightning.num_query_groups, attention.num_query_groups) == (4, 2)
    assert lightning.attention_output_gate and attention.attention_output_gate
    teacher = _config()
    assert not teacher.attention_output_gate
    assert teacher.for_mixer("lightning").attention_output_gate
    assert (teacher.num_query_groups, teacher.attention_output_gate) == (2, False), "a copy was changed"


def _mixer_shapes(*, lightning: bool, gated: bool) -> dict[str, tuple[int, ...]]:
    q, kv = 4 * 16, (4 if lightning else 2) * 16
    shapes = {
        "linear_qkv.weight": (q + (q if gated else 0) + 2 * kv, 48),
        "linear_proj.weight": (48, q),
        "q_layernorm.weight": (16,),
        "k_layernorm.weight": (16,),
    }
    return shapes | ({"core_attention.o_norm.weight": (q,)} if lightning else {})


def _expected_shapes(kind: str, *, tied: bool) -> dict[str, tuple[int, ...]]:
    shapes = {"embedding.word_embeddings.weight": (96, 48), "decoder.final_layernorm.weight": (48,)}
    if not tied:
        shapes["output_layer.weight"] = (96, 48)
    for number in range(3):
        layer = {
            "input_layernorm.weight": (48,),
            "pre_mlp_layernorm.weight": (48,),
            "mlp.linear_fc1.weight": (160, 48),
            "mlp.linear_fc2.weight": (48, 80),
        }
        mixers = {"": _mixer_shapes(lightning=kind == "hybrid" and number != 1, gated=kind == "hybrid")}
        if kind == "aligned":
            mixers = {
                "teacher.": _mixer_shapes(lightning=False, gated=False),
                "student.": _mixer_shapes(lightning=True, gated=True),
            }
        for place, mixer in mixers.items():
            layer |= {f"self_attention.{place}{name}": shape for name, shape in mixer.items()}
        shapes |= {f"decoder.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["teacher", "hybrid", "aligned"])
def test_checkpoint_keys_and_shapes(megatron_cpu, kind, tied):
    """Released checkpoints have these names: conversion, export and other builds of ours rely on them."""
    shape = replace(SHAPE, tied_embeddings=tied)
    student = "lightning" if kind == "aligned" else None
    model = DecoderModel(_config(hybrid=kind == "hybrid", shape=shape), student=student)
    expected = _expected_shapes(kind, tied=tied)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    stored = model_pieces(model)
    assert {piece.key for piece in stored} == expected.keys()
    for piece in stored:
        assert tuple(piece.global_shape) == expected[piece.key], piece.key


def test_teacher_route_is_exactly_the_teacher(teacher, aligned, ids):
    aligned.set_route(Route.TEACHER)
    assert _logits(aligned, ids).equal(_logits(teacher, ids))
    assert all(mixer.loss is None for mixer in aligned.aligned_mixers())


@pytest.mark.parametrize("layer", range(3))
def test_student_route_puts_the_student_in_place_of_one_layer(teacher, aligned, ids, layer):
    unchanged = _logits(aligned, ids)
    mixer = aligned.aligned_mixers()[layer]
    mixer.route = Route.STUDENT
    found = _logits(aligned, ids)
    teacher.decoder.layers[layer].self_attention = mixer.student
    assert found.equal(_logits(teacher, ids))
    assert (found - unchanged).abs().max() > 1e-3


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_align_route_keeps_the_residual_stream(teacher, aligned, ids, training):
    aligned.train(training).set_route(Route.ALIGN)
    heard = []
    for layer in aligned.decoder.layers:
        layer.input_layernorm.register_forward_hook(lambda *call: heard.append(call[-1]))
    with torch.no_grad():
        hidden = aligned(ids)
    assert aligned.logits(hidden).equal(_logits(teacher, ids))
    rotary = aligned.rotary(ids.shape[1])
    for mixer, normed in zip(aligned.aligned_mixers(), heard, strict=True):
        with torch.no_grad():
            both = [
                m(normed, attention_mask=None, rotary_pos_emb=rotary)[0]
                for m in (mixer.student, mixer.teacher)
            ]
        torch.testing.assert_close(mixer.loss.detach(), (both[0] - both[1]).square().mean())
        mixer.loss.backward()
    trained = {name for name, p in aligned.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, _ in aligned.named_parameters() if ".student." in name}


def test_transformer_engine_must_be_there(megatron_cpu, monkeypatch):
    monkeypatch.setattr(transformer_engine, "HAVE_TE", False)
    with pytest.raises(
        ValueError, match="Transformer Engine is not installed; install it or set transformer_impl: local"
    ):
        DecoderModel(_config(transformer_impl="transformer_engine"))


# Stand-ins for Transformer Engine's modules, which need a GPU. They take what the real ones take, and compute by other
# means than the local modules.
ENGINE = {
    name: getattr(transformer_engine, name)
    for name in ("TEColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention")
}


def _accepted_by(name: str, /, *arguments: Any, **options: Any) -> None:
    """TypeError unless the module of this name takes these arguments."""
    inspect.signature(ENGINE[name].__init__).bind(None, *arguments, **options)


class _Norm(RMSNorm):
    """As TE's norms do, it puts an `_extra_state` beside its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, SHAPE.norm_epsilon)

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0)

    def set_extra_state(self, state: Any) -> None: ...


class _Column(ColumnParallelLinear):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        _accepted_by("TEColumnParallelLinear", *arguments, **options)
        super().__init__(*arguments, **options)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None


class _Row(RowParallelLinear):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        _accepted_by("TERowParallelLinear", *arguments, **options)
        super().__init__(*arguments, **options)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None


class _Core(MegatronModule):
    """Plain causal attention, which does not scale the queries by their position."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        _accepted_by("TEDotProductAttention", *arguments, **options)
        super().__init__(options["config"])

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        groups = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) / SHAPE.head_dim**0.5
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


@pytest.fixture
def stand_in_engine(monkeypatch):
    """Modules in the place of Transformer Engine's."""
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    for name, module in {
        "TENorm": _Norm,
        "TEColumnParallelLinear": _Column,
        "TERowParallelLinear": _Row,
        "TEDotProductAttention": _Core,
    }.items():
        monkeypatch.setattr(transformer_engine, name, module)


@pytest.mark.parametrize("kind", ["teacher", "hybrid", "aligned"])
def test_engine_path_has_the_same_keys_and_model(megatron_cpu, stand_in_engine, tmp_path, ids, kind):
    options = {"hybrid": kind == "hybrid", "logits_scaling_base": 8.0 if kind == "hybrid" else None}
    local = DecoderModel(_config(**options), student="lightning" if kind == "aligned" else None).eval()
    engine_config = _config(**options, transformer_impl="transformer_engine")
    engine = DecoderModel(engine_config, student="lightning" if kind == "aligned" else None).eval()
    assert dict(engine.named_parameters()).keys() == dict(local.named_parameters()).keys()
    for layer in engine.decoder.layers:
        assert isinstance(layer.input_layernorm, _Norm), "not fused into linear_qkv"
        assert isinstance(layer.pre_mlp_layernorm, _Norm), "not fused into linear_fc1"
    linears = [module for module in engine.decoder.modules() if isinstance(module, _Column | _Row)]
    assert len(linears) == (6 if kind == "aligned" else 4) * 3
    ours = (RMSNorm, ColumnParallelLinear, RowParallelLinear, SoftmaxAttentionCore)
    assert not [type(module) for module in engine.decoder.modules() if type(module) in ours]

    save_weights(tmp_path / "engine", engine)
    load_weights(tmp_path / "engine", local)
    torch.testing.assert_close(_logits(local, ids), _logits(engine, ids), rtol=1e-4, atol=1e-5)
    _perturb(local)
    save_weights(tmp_path / "local", local)
    load_weights(tmp_path / "local", engine)
    torch.testing.assert_close(_logits(local, ids), _logits(engine, ids), rtol=1e-4, atol=1e-5)


def _perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
