"""The definition of Lightning Attention, which every faster form is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from hypenet_kernels.arguments import reference_dtype


def recurrent_lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o_t = scale * q_t S_t with S_t = gamma_h S_{t-1} + k_t^T v_t, one token at a time.

    slopes [heads]. Returns o in q's dtype and the state after the last token. Differentiable by autograd.
    """
    dtype = reference_dtype(q)
    batch, time, heads, head_dim = q.shape
    gamma = torch.exp(-slopes.to(dtype)).view(1, heads, 1, 1)
    state = q.new_zeros(batch, heads, head_dim, v.shape[-1], dtype=dtype)
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    for t in range(time):
        state = gamma * state + k[:, t, :, :, None].to(dtype) * v[:, t, :, None, :].to(dtype)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t].to(dtype), state))
    return torch.stack(outputs, 1).to(q.dtype), state
