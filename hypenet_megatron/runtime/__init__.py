"""Process groups, seeds, and the CPU (gloo) backend."""

from hypenet_megatron.runtime.layout import ParallelLayout
from hypenet_megatron.runtime.process_groups import joined_world, model_parallel, reset_seeds

__all__ = ["ParallelLayout", "joined_world", "model_parallel", "reset_seeds"]
