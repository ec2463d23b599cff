"""MixerSpec: describes one kind of mixer to conversion, training, export and reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hypenet_megatron.presets import ModelShape

if TYPE_CHECKING:  # Megatron takes seconds to import, and conversions do not need it
    from megatron.core.transformer.spec_utils import ModuleSpec

    from hypenet_megatron.layer_specs import Backend

# What each rank holds: equal runs of rows, of columns, or of the rows of each part (gate and up); or all of it.
TensorParallel = Literal["rows", "columns", "rows of parts", "whole"]


@dataclass(frozen=True)
class Fresh:
    """Initial values of a tensor that the teacher does not have.

    `draw(size, generator)` returns an fp32 tensor. The generator is seeded from (stream, seed, layer) only, so values
    do not depend on the order of tensors, on the dtype or on other layers.
    """

    stream: str
    draw: Callable[[tuple[int, ...], torch.Generator], Tensor]


def _normal(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator) * 0.02


def _ones(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(size)


COPY: Literal["copy"] = "copy"
CLONE_HEADS: Literal["clone heads"] = "clone heads"
ONES = Fresh("ones", _ones)


def normal(stream: str) -> Fresh:
    """Values from N(0, 0.02), the initialisation of new projections in HALO."""
    return Fresh(stream, _normal)


@dataclass(frozen=True)
class HuggingFaceTensor:
    """A tensor of the Hugging Face layout, and how stage 0 initialises it from the teacher.

    `shape` uses the symbols of `symbol_sizes`. `start` is COPY (the teacher's tensor of the same name), CLONE_HEADS
    (the same, with each key/value head repeated until there is one per query head) or `Fresh` values.
    """

    name: str
    shape: str
    start: Literal["copy", "clone heads"] | Fresh = COPY


@dataclass(frozen=True)
class MegatronTensor:
    """A Megatron tensor and the Hugging Face tensors (`parts`) that its rows come from.

    By default the parts are stacked. `per_group` interleaves them: the rows of every part for key/value head 0, then
    for head 1, and so on. `per_expert` puts the parts of expert 0 first, then those of expert 1; Megatron's tensor has
    the experts as its leading axis. `tensor_parallel` is the share of a tensor-parallel rank.
    """

    name: str
    parts: tuple[HuggingFaceTensor, ...]
    tensor_parallel: TensorParallel
    per_group: bool = False
    per_expert: bool = False


def symbol_sizes(shape: ModelShape, kv_heads: int) -> dict[str, int]:
    """Values of the symbols in tensor shapes, for a layer with `kv_heads` key/value heads."""
    return {
        "vocab": shape.vocab_size,
        "hidden": shape.hidden_size,
        "ffn": shape.ffn_hidden_size,
        "head": shape.head_dim,
        "heads": shape.query_heads,
        "queries": shape.query_heads * shape.head_dim,
        "keys": kv_heads * shape.head_dim,
        "experts": shape.experts,
        "expert_ffn": shape.expert_ffn_size,
    }


def self_attention_tensors(
    *, gate: str | None = None, clone_heads: bool = False
) -> tuple[MegatronTensor, ...]:
    """The tensors of Megatron's SelfAttention: fused [q | gate | k | v], q/k norms, output projection.

    `gate` is the Hugging Face name of the output gate's projection, which is drawn from the stream "gate".
    """
    heads = CLONE_HEADS if clone_heads else COPY
    gates = () if gate is None else (HuggingFaceTensor(f"self_attn.{gate}.weight", "queries hidden", normal("gate")),)
    fused = (
        HuggingFaceTensor("self_attn.q_proj.weight", "queries hidden"),
        *gates,
        HuggingFaceTensor("self_attn.k_proj.weight", "keys hidden", heads),
        HuggingFaceTensor("self_attn.v_proj.weight", "keys hidden", heads),
    )
    output = HuggingFaceTensor("self_attn.o_proj.weight", "hidden queries")
    return (
        MegatronTensor("self_attention.linear_qkv.weight", fused, "rows", per_group=True),
        *(
            MegatronTensor(
                f"self_attention.{side}_layernorm.weight",
                (HuggingFaceTensor(f"self_attn.{side}_norm.weight", "head"),),
                "whole",
            )
            for side in "qk"
        ),
        MegatronTensor("self_attention.linear_proj.weight", (output,), "columns"),
    )


@dataclass(frozen=True, kw_only=True)
class MixerSpec:
    """One kind of mixer. docs/add-a-mixer.md explains every field with an example.

    `layer` and `warm_up` may import Megatron, because they are called only to build a model or to compile its kernels.
    Shapes use the symbols of `symbol_sizes`.
    """

    name: str
    title: str
    layer: Callable[[Backend], ModuleSpec]
    tensors: tuple[MegatronTensor, ...]
    rope: bool
    gated: bool
    state: str | None = None
    context_parallel: Literal["heads", "state"] | None = None
    hf_names: tuple[str, ...] = ()
    hf_settings: Mapping[str, Any] = field(default_factory=dict)
    hf_sizes: Mapping[str, str] = field(default_factory=dict)
    hf_optional: Mapping[str, Any] = field(default_factory=dict)
    modeling: tuple[Any, ...] = ()
    warm_up: Callable[[int, int, torch.dtype, torch.device], Iterator[tuple[str, Callable[[], None]]]] | None = None

    @property
    def clones_heads(self) -> bool:
        """Whether the teacher's key/value heads are cloned, so that every query head has its own."""
        return any(part.start == CLONE_HEADS for tensor in self.tensors for part in tensor.parts)

    def kv_heads(self, shape: ModelShape) -> int:
        return shape.query_heads if self.clones_heads else shape.kv_groups

    def parameters(self, shape: ModelShape) -> int:
        """Number of parameters in one layer."""
        sizes = symbol_sizes(shape, self.kv_heads(shape))
        return sum(
            math.prod(sizes[symbol] for symbol in part.shape.split())
            for tensor in self.tensors
            for part in tensor.parts
        )

    def state_shape(self, shape: ModelShape) -> tuple[int, ...] | None:
        """Shape of the recurrent state of one sequence in one layer."""
        sizes = symbol_sizes(shape, self.kv_heads(shape))
        return None if self.state is None else tuple(sizes[symbol] for symbol in self.state.split())
