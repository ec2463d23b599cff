"""Process groups, seeds, and the CPU (gloo) backend."""

from hypenet_megatron.runtime.layout import ONE_PROCESS, ParallelLayout
from hypenet_megatron.runtime.process_groups import (
    MEETING_SECONDS,
    NobodyCame,
    joined_world,
    model_parallel,
    reset_seeds,
)

__all__ = [
    "MEETING_SECONDS",
    "ONE_PROCESS",
    "NobodyCame",
    "ParallelLayout",
    "joined_world",
    "model_parallel",
    "reset_seeds",
]
