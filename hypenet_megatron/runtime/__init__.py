"""Process groups, seeds, and the CPU (gloo) backend."""

from hypenet_megatron.runtime.process_groups import ParallelLayout, model_parallel, reset_seeds

__all__ = ["ParallelLayout", "model_parallel", "reset_seeds"]
