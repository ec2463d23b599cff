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
    """Join the world that the environment describes (rendezvous.py), or form a world of one rank without sockets.

    RendezvousTimeout if a rank does not arrive within `rendezvous_timeout` seconds. A nested call does nothing, so
    several `model_parallel` layouts can use one world in turn.
    """
    if dist.is_initialized():
        yield
        return
    cpu_backend.install()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        # Transformer Engine uses TF32 for fp32 matrix products whatever torch's setting, with relative errors of 1e-3.
        # cuBLAS reads this variable on first use.
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
    """Seed every random generator that a stage may use, with Megatron's offsets for model-parallel ranks."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


@contextmanager
def model_parallel(
    layout: ParallelLayout = ONE_PROCESS, *, seed: int = 0, rendezvous_timeout: float = RENDEZVOUS_SECONDS
) -> Iterator[torch.device]:
    """Set up process groups for `layout` in a `joined_world` while the block runs; yields this rank's device."""
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
            # Megatron does not stop the threads of its groups. In its list, None stands for the whole world.
            for group in parallel_state._global_process_group_list or []:
                if group is not None:
                    dist.destroy_process_group(group)
            parallel_state.destroy_model_parallel()
