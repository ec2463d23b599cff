"""Base classes of the exported mixers. Exports contain a copy of this file, so it imports only torch.

Shapes: b sequences, t new tokens, n tokens seen so far, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class HypeNetRMSNorm(nn.Module):
    """RMSNorm over the last dimension, with statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to the pairs (i, i + D/2) of x [b, H, t, D]. Computes in fp32 and returns the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class HypeNetMixer(nn.Module):
    """Projections and q/k norms common to all mixers.

    Subclasses implement `forward(x, rotary, query_scale, real, past_key_values)`, which returns [b, t, d]. `x` has the
    hidden states [b, t, d], `rotary` cosine and sine [b or 1, 1, t, D], `query_scale` the logits scaling
    [b or 1, 1, t, 1] or None, `real` [b, n] is False at padding or None, `past_key_values` a HypeNetCache or None.
    """

    def __init__(self, config: Any, layer_idx: int, kv_heads: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = HypeNetRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = HypeNetRMSNorm(config.head_dim, config.rms_norm_eps)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project hidden states [b, t, d] to queries [b, H, t, D], keys and values [b, G, t, D]."""
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2), value.transpose(1, 2)
