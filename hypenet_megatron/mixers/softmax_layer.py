"""Softmax attention as Megatron's `core_attention`: PyTorch's fused kernel, grouped kv heads, HyPE's logits scaling."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.context_parallel import (
    heads_for_sequence,
    sequence_for_heads,
    shared_heads_for_sequence,
)


def scale_queries(query: Tensor, config: DecoderConfig, *, training: bool) -> Tensor:
    """Scale query [s, b, heads, dh] at inference by log(t + a) / log(a); unchanged in training or without a base."""
    base = config.logits_scaling_base
    if training or base is None:
        return query
    position = torch.arange(query.shape[0], device=query.device, dtype=torch.float32)
    scale = (torch.log(position + base) / math.log(base)).to(query.dtype)
    return query * scale[:, None, None, None]


class SoftmaxAttentionCore(MegatronModule):
    """Causal attention without Transformer Engine and without padding, because training windows are full.

    Maps query [s, b, heads, dh], key and value [s, b, kv groups, dh] to [s, b, heads * dh]. With context parallelism, s
    is the length of this rank's slice. The ranks exchange heads, so each attends over the whole sequence with some of
    them.
    """

    def __init__(self, config: DecoderConfig, *, pg_collection: ProcessGroupCollection, **_: Any):
        super().__init__(config)
        self.cp_group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        key, value = (shared_heads_for_sequence(x, query.shape[2], self.cp_group) for x in (key, value))
        query = heads_for_sequence(query, self.cp_group)
        query = scale_queries(query, self.config, training=self.training)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return sequence_for_heads(output.permute(2, 0, 1, 3), self.cp_group).flatten(2)
