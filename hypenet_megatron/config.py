"""HypeNetConfig: a Megatron TransformerConfig that knows the mixer of every layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from hypenet_megatron.presets import MixerType, ModelShape


@dataclass
class HypeNetConfig(TransformerConfig):
    """Qwen3 teacher (`hybrid=False`) or HypeNet hybrid (`hybrid=True`) as Megatron sees it.

    The teacher has softmax attention with RoPE and no gates in every layer. A hybrid has NoPE in its attention layers,
    RoPE in its Lightning layers (HyPE) and an output gate in both. `logits_scaling_base` is the `a` of
    s_t = log(t + a) / log(a), applied to attention queries at inference only; None turns it off.
    """

    mixer_types: Sequence[MixerType] = ()
    hybrid: bool = False
    logits_scaling_base: float | None = None
    vocab_size: int = 0
    tied_embeddings: bool = True
    rope_theta: float = 1e6
    max_positions: int = 40_960
    # TransformerBlock asks get_config_for_layer for each layer's own config when this is set.
    heterogeneous_block_specs: bool = True
    _layer_configs: dict[str, HypeNetConfig] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.mixer_types) != self.num_layers:
            raise ValueError(
                f"mixer_types names {len(self.mixer_types)} layers but the model has {self.num_layers}; "
                "give one of 'attn' or 'lightning' per layer"
            )
        unknown = sorted(set(self.mixer_types) - set(get_args(MixerType)))
        if unknown:
            raise ValueError(f"mixer_types names {unknown[0]!r}; give one of 'attn' or 'lightning' per layer")
        if self.hybrid:
            self.attention_output_gate = True
            self.no_rope_freq = [1 if mixer == "attn" else 0 for mixer in self.mixer_types]
        elif "lightning" in self.mixer_types:
            raise ValueError(
                "a teacher has only 'attn' layers; set hybrid=True for a model with Lightning layers"
            )
        super().__post_init__()

    @classmethod
    def from_shape(
        cls,
        shape: ModelShape,
        mixer_types: Sequence[MixerType],
        *,
        hybrid: bool,
        dtype: torch.dtype = torch.float32,
        logits_scaling_base: float | None = None,
        **megatron_options: Any,
    ) -> HypeNetConfig:
        """Config of `shape` in `dtype`; `megatron_options` are parallel sizes and the like, passed through."""
        return cls(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            ffn_hidden_size=shape.ffn_hidden_size,
            num_attention_heads=shape.query_heads,
            num_query_groups=shape.kv_groups,
            kv_channels=shape.head_dim,
            vocab_size=shape.vocab_size,
            tied_embeddings=shape.tied_embeddings,
            rope_theta=shape.rope_theta,
            max_positions=shape.max_positions,
            layernorm_epsilon=shape.norm_epsilon,
            mixer_types=tuple(mixer_types),
            hybrid=hybrid,
            logits_scaling_base=logits_scaling_base,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            **{**_QWEN3_BLOCK, **megatron_options},
        )

    def get_config_for_layer(self, layer_number: int) -> HypeNetConfig:
        """Config of 1-based layer `layer_number`: Lightning layers have as many kv heads as query heads."""
        mixer = self.mixer_types[layer_number - 1]
        if mixer == "attn":
            return self
        return self.lightning_config()

    def lightning_config(self) -> HypeNetConfig:
        """This config for a Lightning mixer: kv heads cloned to one per query head, output gate on."""
        if "lightning" not in self._layer_configs:
            config = copy.copy(
                self
            )  # dataclasses.replace would run __post_init__ again and double its effects
            config.num_query_groups = self.num_attention_heads
            config.attention_output_gate = True
            self._layer_configs["lightning"] = config
        return self._layer_configs["lightning"]


_QWEN3_BLOCK: dict[str, Any] = {
    "normalization": "RMSNorm",
    "qk_layernorm": True,
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "use_cpu_initialization": True,  # the same weights from the same seed on any device
    "transformer_impl": "local",
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "batch_p2p_comm": False,
    "deallocate_pipeline_outputs": True,
}
