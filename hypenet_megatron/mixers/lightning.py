"""Lightning Attention: linear attention with a fixed decay per head, RoPE, and one output norm over all heads.

    S_t = gamma_h S_{t-1} + k_t^T v_t,   o_t = q_t S_t / sqrt(D)

The Megatron module is in `lightning_layer.py`, its kernels are in `hypenet_kernels`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hypenet_kernels.lightning import decay_slopes
from hypenet_kernels.warm_up import lightning_calls
from hypenet_megatron.mixers.modeling import HypeNetMixer, HypeNetRMSNorm, rotate
from hypenet_megatron.mixers.spec import (
    ONES,
    HuggingFaceTensor,
    MegatronTensor,
    MixerSpec,
    self_attention_tensors,
)

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

    from hypenet_megatron.layer_specs import Backend


@lru_cache(maxsize=64)
def slopes_on(heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(decay_slopes(heads), device=device, dtype=dtype)


def lightning_attention(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, real: Tensor | None, block: int = 256
) -> tuple[Tensor, Tensor]:
    """Linear attention with decay over t tokens after `state` [b, H, D, D] (None: the sequence begins), in chunks.

    S_i = gamma S_{i-1} + k_i^T v_i and o_i = q_i S_i / sqrt(D) over the tokens where `real` [b, t] is True. Padding
    leaves the state as it is. query, key and value are [b, H, t, D]. Returns o [b, H, t, D] and the new fp32 state.
    """
    b, heads, t, head_dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    slopes = slopes_on(heads, query.device, dtype)[:, None, None]
    if state is None:
        state = torch.zeros(b, heads, head_dim, head_dim, device=query.device, dtype=dtype)
    if real is not None:
        key, value = (x.masked_fill(~real[:, None, :, None], 0) for x in (key, value))
    outputs = []
    for start in range(0, t, block):
        q, k, v = (x[:, :, start : start + block].to(dtype) for x in (query, key, value))
        if real is None:
            age = torch.arange(1, q.shape[2] + 1, device=query.device)[None, None, :, None]
        else:
            age = real[:, None, start : start + block, None].cumsum(dim=2)
        age = age.to(dtype)  # [b or 1, 1, c, 1]: number of real tokens from the start of the chunk up to this one
        distance = (age - age.transpose(2, 3)).clamp(min=0)
        decay = torch.exp(-slopes * distance).tril()
        q = q * head_dim**-0.5
        output = (q @ k.transpose(2, 3) * decay) @ v + (q @ state) * torch.exp(-slopes * age)
        outputs.append(output.to(value.dtype))
        last = age[:, :, -1:]
        added = (k * torch.exp(-slopes * (last - age))).transpose(2, 3) @ v
        state = torch.exp(-slopes * last) * state + added
    return torch.cat(outputs, dim=2), state


class HypeNetLightningAttention(HypeNetMixer):
    """Projections, RoPE, `lightning_attention`, output norm over all heads, and output gate."""

    block = 256

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.num_attention_heads)
        width = config.num_attention_heads * config.head_dim
        self.z_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_norm = HypeNetRMSNorm(width, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: Any, query_scale: Tensor | None, real: Tensor | None, past_key_values: Any
    ) -> Tensor:
        query, key, value = self.heads(x)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        state = None if past_key_values is None else past_key_values.states.get(self.layer_idx)
        new = None if real is None else real[:, -x.shape[1] :]
        with torch.autocast(device_type=x.device.type, enabled=False):
            output, state = lightning_attention(query, key, value, state, new, self.block)
        if past_key_values is not None:
            past_key_values.states[self.layer_idx] = state
        return self.o_proj(self.o_norm(output.transpose(1, 2).flatten(2)) * torch.sigmoid(self.z_proj(x)))


def _layer(backend: Backend) -> ModuleSpec:
    from hypenet_megatron.layer_specs import self_attention_spec
    from hypenet_megatron.mixers.lightning_layer import LightningCore, LightningSelfAttention

    return self_attention_spec(backend, LightningSelfAttention, LightningCore)


_OUTPUT_NORM = HuggingFaceTensor("self_attn.o_norm.weight", "queries", ONES)

LIGHTNING = MixerSpec(
    name="lightning",
    title="Lightning Attention",
    layer=_layer,
    tensors=(
        *self_attention_tensors(gate="z_proj", clone_heads=True),
        MegatronTensor("self_attention.core_attention.o_norm.weight", (_OUTPUT_NORM,), "rows"),
    ),
    rope=True,
    gated=True,
    state="heads head head",
    context_parallel="state",
    hf_names=("lightning-attn", "lightning_attn"),
    hf_settings={
        "lightning_use_rope": True,
        "lightning_use_qk_norm": True,
        "lightning_use_output_norm": True,
        "lightning_use_output_gate": True,
        "lightning_scale": "1/sqrt(d)",
    },
    hf_sizes={
        "lightning_nh": "num_attention_heads",
        "lightning_nkv": "num_attention_heads",
        "lightning_head_dim": "head_dim",
    },
    hf_optional={"lightning_use_short_conv": False, "lightning_rope_scaling": None},
    modeling=(decay_slopes, slopes_on, lightning_attention, HypeNetLightningAttention),
    warm_up=lightning_calls,
)
