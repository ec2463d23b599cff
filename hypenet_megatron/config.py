"""DecoderConfig: a Megatron TransformerConfig with a mixer per layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from hypenet_megatron.mixers import mixer
from hypenet_megatron.presets import TEACHER, ModelShape


@dataclass
class DecoderConfig(TransformerConfig):
    """Megatron config of a Qwen3 teacher or a HypeNet hybrid: the teacher's sizes, and a mixer per layer.

    `mixer_types` names one mixer (`hypenet_megatron.mixers`) per layer; in a teacher, all are the teacher's attention.
    `logits_scaling_base` is the `a` of s_t = log(t + a) / log(a), which scales attention queries at inference only.
    None turns the scaling off. ValueError if a mixer is unknown or their number is not `num_layers`.
    """

    mixer_types: Sequence[str] = ()
    logits_scaling_base: float | None = None
    vocab_size: int = 0
    tied_embeddings: bool = True
    rope_theta: float = 1e6
    max_positions: int = 40_960
    # Makes TransformerBlock call get_config_for_layer for each layer.
    heterogeneous_block_specs: bool = True
    _mixer_configs: dict[str, DecoderConfig] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.mixer_types) != self.num_layers:
            raise ValueError(
                f"mixer_types names {len(self.mixer_types)} layers but the model has {self.num_layers}; "
                "give one mixer per layer"
            )
        for name in self.mixer_types:
            mixer(name)
        super().__post_init__()

    @property
    def hybrid(self) -> bool:
        return any(name != TEACHER for name in self.mixer_types)

    @classmethod
    def from_shape(
        cls,
        shape: ModelShape,
        mixer_types: Sequence[str],
        *,
        dtype: torch.dtype = torch.float32,
        logits_scaling_base: float | None = None,
        **megatron_options: Any,
    ) -> DecoderConfig:
        """Config of a model of `shape` in `dtype`. `megatron_options` override fields of TransformerConfig."""
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
            logits_scaling_base=logits_scaling_base,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            **{**_QWEN3_BLOCK, **megatron_options},
        )

    def get_config_for_layer(self, layer_number: int) -> DecoderConfig:
        """Config of the 1-based layer `layer_number`."""
        return self.for_mixer(self.mixer_types[layer_number - 1])

    def for_mixer(self, name: str) -> DecoderConfig:
        """This config with the key/value heads, output gate and RoPE setting of the mixer `name`."""
        if name not in self._mixer_configs:
            spec = mixer(name)
            config = copy.copy(self)  # dataclasses.replace would run __post_init__ again, which is not idempotent
            config.attention_output_gate = spec.gated
            config.no_rope_freq = [0 if spec.rope else 1] * self.num_layers
            if spec.clones_heads:
                config.num_query_groups = self.num_attention_heads
            self._mixer_configs[name] = config
        return self._mixer_configs[name]


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
