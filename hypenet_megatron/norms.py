"""RMSNorm for the local (no Transformer Engine) path, and the weight of Lightning layers' full-width output norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from hypenet_megatron.config import HypeNetConfig


def weight_in_use(module: nn.Module) -> Tensor:
    """`module.weight`, for those who read it without calling the module.

    When parameters are gathered while computing, Megatron waits for them in a forward pre-hook of the module that owns
    them; a weight read past the hook could be the one before the last update.
    """
    for announce in module._forward_pre_hooks.values():
        announce(module, ())
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


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
    """The weight of one RMSNorm over the channels of ALL heads, [heads * head_dim / tp], sharded with the heads.

    Applying it is fused with the output gate (`hypenet_kernels.gated_norm`).
    """

    def __init__(self, config: HypeNetConfig, local_size: int, tp_group: dist.ProcessGroup):
        super().__init__(config)
        self.tp_group = tp_group
        self.weight = nn.Parameter(torch.ones(local_size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

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
