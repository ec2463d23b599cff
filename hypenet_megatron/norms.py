"""RMSNorm for models without Transformer Engine, and weights that are sharded by heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from hypenet_megatron.config import DecoderConfig


def weight_in_use(module: nn.Module) -> Tensor:
    """The current `module.weight`, for callers that do not call the module.

    With overlapped parameter gathering, Megatron waits for a parameter in a forward pre-hook of its module. Without the
    hook, the weight could still be the one before the last update.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


class RMSNorm(nn.Module):
    """y = weight * x / rms(x) over the last dimension, with statistics in fp32.

    It replaces Megatron's WrappedTorchNorm, which does not support sequence parallelism.
    """

    def __init__(self, config: DecoderConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class HeadsWeight(MegatronModule):
    """A weight of `local_size` entries per tensor-parallel rank, sharded by heads and initialised to ones.

    The module has no forward; the mixer that owns it reads `weight_in_use`. An output norm over the channels of all
    heads is a HeadsWeight, because one kernel applies the norm and the output gate.
    """

    def __init__(self, config: DecoderConfig, local_size: int, tp_group: dist.ProcessGroup):
        super().__init__(config)
        self.tp_group = tp_group
        self.weight = nn.Parameter(torch.ones(local_size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        assert metadata is not None, "this project's checkpoints always pass metadata"
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
