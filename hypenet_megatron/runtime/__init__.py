"""Process groups, seeds, and the CPU (gloo) backend."""

from hypenet_megatron.runtime.layout import ONE_PROCESS, ParallelLayout
from hypenet_megatron.runtime.process_groups import joined_world, model_parallel, reset_seeds

__all__ = ["ONE_PROCESS", "ParallelLayout", "joined_world", "model_parallel", "reset_seeds"]
