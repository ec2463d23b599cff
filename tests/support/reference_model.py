"""HypeNet once more, as slowly and plainly as the maths allows: what every implementation must match.

Shares no code with the product. Lightning layers run their recurrence token by token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def hypenet_forward(
    hf_tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    input_ids: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Logits [b, t, vocabulary] at inference, computed in `dtype`.

    Takes the tensors and the config.json of a HypeNet folder, and ids [b, t] without padding.
    """
    weights = {name: hf_tensors[name].to(dtype) for name in hf_tensors}
    x = weights["model.embed_tokens.weight"][input_ids]
    for layer, mixer_type in enumerate(config["mixer_types"]):
        own = {name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in weights.items()}
        mixer = {"attn": attention, "lightning-attn": lightning}[mixer_type]
        x = x + mixer(own, config, rms_norm(x, own["input_layernorm.weight"], config))
        h = rms_norm(x, own["post_attention_layernorm.weight"], config)
        gate, up = h @ own["mlp.gate_proj.weight"].T, h @ own["mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ own["mlp.down_proj.weight"].T
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms_norm(x, weights["model.norm.weight"], config) @ head.T


def rms_norm(x: Tensor, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight


def qkv(own: Mapping[str, Tensor], config: Mapping[str, Any], h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as [b, t, heads, dh], one k and v head per query head."""
    split = [
        (h @ own[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, config["head_dim"])) for name in "qkv"
    ]
    q = rms_norm(split[0], own["self_attn.q_norm.weight"], config)
    k = rms_norm(split[1], own["self_attn.k_norm.weight"], config)
    owner = [head * k.shape[2] // q.shape[2] for head in range(q.shape[2])]
    return q, k[:, :, owner], split[2][:, :, owner]


def attention(own: Mapping[str, Tensor], config: Mapping[str, Any], h: Tensor) -> Tensor:
    q, k, v = qkv(own, config, h)
    if config["attn_logits_scaling"] is not None:
        a = float(config["attn_logits_scaling"].split()[1])
        scale = [math.log(t + a) / math.log(a) for t in range(h.shape[1])]
        q = q * torch.tensor(scale, dtype=h.dtype)[None, :, None, None]
    out = torch.zeros_like(q)
    for t in range(h.shape[1]):
        scores = torch.einsum("bhd,bjhd->bhj", q[:, t], k[:, : t + 1]) / math.sqrt(config["head_dim"])
        out[:, t] = torch.einsum("bhj,bjhd->bhd", scores.softmax(-1), v[:, : t + 1])
    gate = torch.sigmoid(h @ own["self_attn.o_gate.weight"].T)
    return (out.flatten(2) * gate) @ own["self_attn.o_proj.weight"].T


def lightning(own: Mapping[str, Tensor], config: Mapping[str, Any], h: Tensor) -> Tensor:
    q, k, v = qkv(own, config, h)
    q, k = rope(q, config), rope(k, config)
    gamma = torch.tensor([math.exp(-slope) for slope in slopes(q.shape[2])], dtype=h.dtype)[:, None, None]
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=h.dtype)
    out = torch.zeros_like(v)
    for t in range(h.shape[1]):
        state = gamma * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out[:, t] = torch.einsum("bhd,bhde->bhe", q[:, t], state) / math.sqrt(config["head_dim"])
    normed = rms_norm(out.flatten(2), own["self_attn.o_norm.weight"], config)
    gate = torch.sigmoid(h @ own["self_attn.z_proj.weight"].T)
    return (normed * gate) @ own["self_attn.o_proj.weight"].T


def rope(x: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Rotates the pair (i, i + dh/2) of x [b, t, heads, dh] at position t by t / theta^(2i/dh)."""
    half = config["head_dim"] // 2
    out = x.clone()
    for i in range(half):
        angle = torch.arange(x.shape[1], dtype=x.dtype) / config["rope_theta"] ** (i / half)
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        out[..., i] = x[..., i] * cos - x[..., i + half] * sin
        out[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
    return out


def slopes(heads: int) -> list[float]:
    power = 1
    while power * 2 <= heads:
        power *= 2
    of_twice = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1)]
    return ([2 ** (-8 * h / power) for h in range(1, power + 1)] + of_twice[0::2])[:heads]
