"""Softmax attention of the teacher (Qwen3: RoPE, no gate) and of the hybrid (HyPE: no positions, output gate)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypenet_megatron.mixers.modeling import HypeNetMixer
from hypenet_megatron.mixers.spec import MixerSpec, self_attention_tensors
from hypenet_megatron.presets import ATTENTION, TEACHER

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

    from hypenet_megatron.layer_specs import Backend


def causal_attention(query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, block: int = 1024) -> Tensor:
    """Causal softmax attention [b, H, t, D] of the last t of n tokens: query [b, H, t, D], key and value [b, G, n, D].

    `real` [b, n] hides padding. A padded query attends to itself, because a softmax over no key would be NaN. Masks are
    built for `block` queries at a time, so there is never a [t, n] mask.
    """
    t, n = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if real is None and t in (1, n):
        return F.scaled_dot_product_attention(query, key, value, is_causal=t > 1, enable_gqa=grouped)
    if grouped and t > 1:
        # PyTorch has a memory-efficient kernel with a mask for repeated heads, not for grouped ones.
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        grouped = False
    outputs = []
    for start in range(0, t, block):
        queries = query[:, :, start : start + block]
        end = n - t + start + queries.shape[2]
        own = torch.arange(end - queries.shape[2], end, device=query.device)[:, None]
        other = torch.arange(end, device=query.device)
        visible = (other <= own)[None]
        if real is not None:
            visible = visible & (real[:, None, :end] | (other == own))
        outputs.append(
            F.scaled_dot_product_attention(
                queries, key[:, :, :end], value[:, :, :end], attn_mask=visible[:, None], enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2)


class HypeNetAttention(HypeNetMixer):
    """Softmax attention without positions. `query_scale` sharpens it in long contexts."""

    block = 1024

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.num_key_value_heads)
        self.o_gate = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)

    def forward(
        self, x: Tensor, rotary: Any, query_scale: Tensor | None, real: Tensor | None, past_key_values: Any
    ) -> Tensor:
        query, key, value = self.heads(x)
        if query_scale is not None:
            query = (query * query_scale).to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output = causal_attention(query, key, value, real, self.block)
        return self.o_proj(output.transpose(1, 2).flatten(2) * torch.sigmoid(self.o_gate(x)))


def _layer(backend: Backend) -> ModuleSpec:
    from megatron.core.transformer.attention import SelfAttention

    from hypenet_megatron.layer_specs import self_attention_spec

    return self_attention_spec(backend, SelfAttention, backend.softmax_core)


QWEN3_ATTENTION = MixerSpec(
    name=TEACHER,
    title="softmax attention with RoPE",
    layer=_layer,
    tensors=self_attention_tensors(),
    rope=True,
    gated=False,
    context_parallel="heads",
)

HYBRID_ATTENTION = MixerSpec(
    name=ATTENTION,
    title="softmax attention without positions",
    layer=_layer,
    tensors=self_attention_tensors(gate="o_gate"),
    rope=False,
    gated=True,
    context_parallel="heads",
    hf_names=("attn",),
    hf_settings={"attn_use_rope": False, "attn_use_output_gate": True},
    modeling=(causal_attention, HypeNetAttention),
)
