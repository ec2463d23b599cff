"""Process groups, seeds, and the CPU (gloo) backend."""

from hypenet_megatron.runtime.layout import ONE_PROCESS, ParallelLayout
from hypenet_megatron.runtime.process_groups import joined_world, model_parallel, reset_seeds
from hypenet_megatron.runtime.rendezvous import RENDEZVOUS_SECONDS, RendezvousTimeout

__all__ = [
    "ONE_PROCESS",
    "RENDEZVOUS_SECONDS",
    "ParallelLayout",
    "RendezvousTimeout",
    "joined_world",
    "model_parallel",
    "reset_seeds",
]
