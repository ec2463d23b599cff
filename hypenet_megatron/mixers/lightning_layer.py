"""Lightning Attention as a Megatron layer: fused q/k norm and RoPE, attention, output norm over all heads, gate.

Megatron's SelfAttention provides the projections, their tensor-parallel layout and their checkpoint keys. Between the
projections, tensors have the kernels' layout [batch, time, heads, head_dim] and are views of the fused projection.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from hypenet_kernels import decay_slopes, gated_norm, heads_sum_of_squares, lightning_attention, norm_rope
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.norms import HeadsWeight, weight_in_use


@functools.lru_cache
def _rates(slopes: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Decay rates of the heads. Cached, because creating the tensor on a GPU waits for all queued work."""
    return torch.tensor(slopes, dtype=dtype, device=device)


def state_before_slice(k: Tensor, v: Tensor, slopes: Sequence[float], group: dist.ProcessGroup) -> Tensor:
    """The recurrent state before this rank's slice, from the keys and values of all ranks. Differentiable.

        S(r)      = sum over t in slice r of gamma^(L - 1 - t) k_t^T v_t
        before(r) = sum over j < r of gamma^((r - 1 - j) L) S(j)

    k and v are [batch, L, heads, head_dim]; the result is [batch, heads, head_dim, head_dim] in fp32 (fp64 if k is).
    Each rank sends one state per layer at any length, by an all-gather forward and a reduce-scatter backward.
    """
    ranks, length = group.size(), k.shape[1]
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    rates = _rates(tuple(slopes), dtype, k.device)
    to_end = torch.arange(length - 1, -1, -1, dtype=dtype, device=k.device)
    weighted = k * torch.exp(-to_end[:, None] * rates)[:, :, None].to(k.dtype)
    state = torch.einsum("blhk,blhv->bhkv", weighted, v).to(dtype)
    states = gather_from_sequence_parallel_region(state[None], group=group)
    distance = group.rank() - 1 - torch.arange(ranks, dtype=dtype, device=k.device)
    decay = torch.exp(-distance.clamp(min=0)[:, None] * length * rates) * (distance >= 0)[:, None]
    return torch.einsum("rh,rbhkv->bhkv", decay, states)


class LightningCore(MegatronModule):
    """Lightning Attention over this rank's heads, as Megatron's `core_attention`.

    S_t = gamma_h S_{t-1} + k_t^T v_t and o_t = q_t S_t / sqrt(dh); the output is RMSNorm(o), over all heads, times
    sigmoid(gate).
    """

    def __init__(self, config: DecoderConfig, *, pg_collection: ProcessGroupCollection, **_: Any):
        super().__init__(config)
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        local_heads = config.num_attention_heads // self.tp_group.size()
        first = self.tp_group.rank() * local_heads
        self.slopes = decay_slopes(config.num_attention_heads)[first : first + local_heads]
        self.scale = config.kv_channels**-0.5
        self.o_norm = HeadsWeight(config, local_heads * config.kv_channels, self.tp_group)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """Map q, k (normed and rotated), v and gate [b, s / cp, heads / tp, dh] to [b, s / cp, heads / tp * dh]."""
        before = state_before_slice(k, v, self.slopes, self.cp_group) if self.cp_group.size() > 1 else None
        o, _ = lightning_attention(q, k, v, self.slopes, self.scale, initial_state=before)
        weight, epsilon = weight_in_use(self.o_norm), self.config.layernorm_epsilon
        if self.tp_group.size() == 1:
            return gated_norm(o, gate, weight, epsilon)
        # The norm is over all heads, which tensor parallelism splits: reduce the sum of squares, forward and backward.
        squares = reduce_from_tensor_model_parallel_region(heads_sum_of_squares(o), self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        return gated_norm(o, gate, weight, epsilon, squares, weight.numel() * self.tp_group.size())


class LightningSelfAttention(SelfAttention):
    """Megatron's SelfAttention with Lightning Attention between its two projections."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, rotary_pos_emb: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map hidden_states [s, b, d] to (output of the same shape, bias or None), with RoPE angles [s, 1, 1, dh].
        s is the length of this rank's slice. With sequence parallelism, hidden_states is [s / tp, b, d]."""
        mixed, _bias = self.linear_qkv(hidden_states)
        # Each head has [query, gate, key, value], because there are as many key/value heads as query heads.
        mixed = mixed.unflatten(-1, (-1, 4, self.hidden_size_per_attention_head)).transpose(0, 1)
        query, gate, key, value = mixed.unbind(-2)
        angles = rotary_pos_emb[:, 0, 0, : self.hidden_size_per_attention_head // 2]
        q, k = norm_rope(
            query,
            key,
            weight_in_use(self.q_layernorm),
            weight_in_use(self.k_layernorm),
            torch.cos(angles),
            torch.sin(angles),
            self.config.layernorm_epsilon,
        )
        mixed_output = self.core_attention(q, k, value, gate)
        return self.linear_proj(mixed_output.transpose(0, 1))
