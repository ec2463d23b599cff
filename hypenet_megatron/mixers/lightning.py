"""Lightning Attention as a Megatron core attention, with the full-width output norm behind it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from hypenet_kernels import chunked_lightning_attention, decay_slopes
from hypenet_megatron.config import HypeNetConfig
from hypenet_megatron.norms import HeadsRMSNorm


class LightningCore(MegatronModule):
    """S_t = gamma_h S_{t-1} + k_t^T v_t, o_t = q_t S_t / sqrt(dh), then RMSNorm over all heads."""

    slopes: Tensor

    def __init__(self, config: HypeNetConfig, *, pg_collection: ProcessGroupCollection, **_: Any):
        super().__init__(config)
        tp_group = pg_collection.tp
        local_heads = config.num_attention_heads // tp_group.size()
        first = tp_group.rank() * local_heads
        slopes = torch.tensor(decay_slopes(config.num_attention_heads)[first : first + local_heads])
        self.register_buffer("slopes", slopes, persistent=False)
        self.scale = config.kv_channels**-0.5
        self.o_norm = HeadsRMSNorm(
            config, local_heads * config.kv_channels, config.layernorm_epsilon, tp_group
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        # A model cast to bf16 casts its buffers too; the decay is exact only in fp32.
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        output, _state = chunked_lightning_attention(q, k, v, self.slopes.float(), self.scale)
        return self.o_norm(output.transpose(0, 1).flatten(2))
