"""The parallel layout of the running processes, as a checkpoint records it."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state


def current_layout() -> dict[str, int]:
    """Ranks along every axis of parallelism. Resume is bit-exact at an equal layout, within float noise at others."""
    return {
        "world": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }
