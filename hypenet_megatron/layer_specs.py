"""The Megatron modules of a layer: a stock TransformerLayer around the layer's mixer.

Norms are not fused with the linear layers after them, even with Transformer Engine: alignment needs the normalised
input, and checkpoint keys stay the same with and without Transformer Engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from hypenet_megatron.alignment import AlignedSelfAttention
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.mixers import mixer
from hypenet_megatron.mixers.softmax_layer import SoftmaxAttentionCore, scale_queries
from hypenet_megatron.norms import RMSNorm


@dataclass(frozen=True)
class Backend:
    """The modules that Transformer Engine can replace."""

    norm: Any
    column_linear: Any
    row_linear: Any
    softmax_core: Any


def backend_for(config: DecoderConfig) -> Backend:
    """Modules for `config.transformer_impl`, "local" or "transformer_engine". ValueError if the latter is missing."""
    if config.transformer_impl == "local":
        return Backend(RMSNorm, ColumnParallelLinear, RowParallelLinear, SoftmaxAttentionCore)
    # Without Transformer Engine, Megatron's module imports mocks, which fail only when a layer is built.
    from megatron.core.extensions import transformer_engine as te

    if not te.HAVE_TE:
        raise ValueError(
            f"transformer_impl is {config.transformer_impl} but Transformer Engine is not installed; "
            "install it or set transformer_impl: local"
        )

    class ScaledTEDotProductAttention(te.TEDotProductAttention):
        """Transformer Engine's attention with HyPE's logits scaling."""

        def forward(self, query: Tensor, *args: Any, **options: Any) -> Tensor:
            query = scale_queries(query, self.config, training=self.training)
            return super().forward(query, *args, **options)

    # Transformer Engine's context parallelism expects zig-zag slices; this project's slices are contiguous.
    contiguous = config.context_parallel_size > 1
    softmax_core = SoftmaxAttentionCore if contiguous else ScaledTEDotProductAttention
    return Backend(te.TENorm, te.TEColumnParallelLinear, te.TERowParallelLinear, softmax_core)


def self_attention_spec(backend: Backend, module: type, core: Any) -> ModuleSpec:
    """Spec of `module`, Megatron's SelfAttention or a subclass, around a mixer's `core`."""
    return ModuleSpec(
        module=module,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_linear,
            core_attention=core,
            linear_proj=backend.row_linear,
            q_layernorm=backend.norm,
            k_layernorm=backend.norm,
        ),
    )


def _layer_spec(self_attention: ModuleSpec, backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=self_attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=backend.column_linear, linear_fc2=backend.row_linear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    config: DecoderConfig, *, pp_rank: int, vp_stage: int | None = None, student: str | None = None
) -> TransformerBlockSubmodules:
    """Specs of the layers of pipeline rank `pp_rank` and virtual stage `vp_stage`; with `student`, aligned layers."""
    if config.pipeline_model_parallel_layout is not None:
        layers = config.pipeline_model_parallel_layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    else:
        first = get_transformer_layer_offset(config, vp_stage, pp_rank)
        layers = range(first, first + get_num_layers_to_build(config, vp_stage, pp_rank))
    backend = backend_for(config)
    mixers = [mixer(config.mixer_types[layer]).layer(backend) for layer in layers]
    if student is not None:  # HALO stage 1
        mixers = [
            ModuleSpec(
                module=AlignedSelfAttention,
                params={"student": student},
                submodules={"teacher": teacher, "student": mixer(student).layer(backend)},
            )
            for teacher in mixers
        ]
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(attention, backend) for attention in mixers], layer_norm=backend.norm
    )
