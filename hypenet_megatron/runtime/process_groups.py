"""Start and end of a Megatron process: backend, process groups, seeds."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from hypenet_megatron.runtime import cpu_backend
from hypenet_megatron.runtime.layout import ONE_PROCESS, ParallelLayout
from hypenet_megatron.runtime.rendezvous import RENDEZVOUS_SECONDS, rendezvous

_COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@contextmanager
def joined_world(rendezvous_timeout: float = RENDEZVOUS_SECONDS) -> Iterator[None]:
    """Join the world that the environment describes (rendezvous.py), or be a world of one rank without any socket.

    The ranks wait `rendezvous_timeout` seconds for each other; RendezvousTimeout after that. Nested in itself this does
    nothing, so that one world can be laid out several times, one after the other.
    """
    if dist.is_initialized():
        yield
        return
    cpu_backend.install()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        # Transformer Engine requests TF32 for all products of fp32 matrices, whatever torch is set to: relative errors
        # of 1e-3 where fp32 was chosen. cuBLAS reads this variable when it is first used.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "HALO_RENDEZVOUS" in os.environ:
        store, rank, size = rendezvous(rendezvous_timeout)
        store.set_timeout(_COLLECTIVE_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def reset_seeds(seed: int) -> None:
    """Seed every generator that a stage may use; model-parallel ranks get Megatron's per-rank offsets."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


@contextmanager
def model_parallel(
    layout: ParallelLayout = ONE_PROCESS, *, seed: int = 0, rendezvous_timeout: float = RENDEZVOUS_SECONDS
) -> Iterator[torch.device]:
    """Set up process groups for `layout` while the block runs, in a `joined_world`; yields the device of models."""
    cpu_backend.install()
    from megatron.core import parallel_state

    logging.getLogger("megatron").setLevel(logging.ERROR)
    with joined_world(rendezvous_timeout):
        layout.data_ranks(dist.get_world_size())
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tensor,
                pipeline_model_parallel_size=layout.pipeline,
                virtual_pipeline_model_parallel_size=(
                    layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
                ),
                context_parallel_size=layout.context,
            )
            reset_seeds(seed)
            has_cuda = torch.cuda.is_available()
            yield torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")
        finally:
            # Megatron would leave the threads of its groups running. None stands for the whole world.
            for group in parallel_state._global_process_group_list or []:
                if group is not None:
                    dist.destroy_process_group(group)
            parallel_state.destroy_model_parallel()
