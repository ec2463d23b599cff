"""RMSNorm for the local (no Transformer Engine) path, and the full-width output norm of Lightning layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from hypenet_megatron.config import HypeNetConfig


class RMSNorm(nn.Module):
    """y = weight * x / rms(x) over the last dimension, statistics in fp32.

    Megatron's WrappedTorchNorm refuses sequence parallelism, hence our own.
    """

    def __init__(self, config: HypeNetConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class HeadsRMSNorm(MegatronModule):
    """One RMSNorm over the channels of ALL heads, [s, b, heads * head_dim / tp].

    Tensor parallelism splits the heads, so the sum of squares is summed over ranks, forward and backward: one
    all-reduce of [s, b, 1]. The weight is sharded with the heads.
    """

    def __init__(self, config: HypeNetConfig, local_size: int, eps: float, tp_group: dist.ProcessGroup):
        super().__init__(config)
        self.eps = eps
        self.tp_group = tp_group
        self.full_size = local_size * tp_group.size()
        self.weight = nn.Parameter(torch.ones(local_size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.tp_group.size() == 1:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        y = x.float()
        squares = y.square().sum(-1, keepdim=True)
        squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        y = y * torch.rsqrt(squares / self.full_size + self.eps)
        return self.weight * y.to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        assert metadata is not None, "our checkpoints always pass metadata"
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
