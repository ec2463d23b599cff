"""Start and end of a Megatron process: backend, process groups, seeds."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from hypenet_megatron.runtime import cpu_backend
from hypenet_megatron.runtime.layout import ONE_PROCESS, ParallelLayout

MEETING_SECONDS = 600.0
_COLLECTIVE_PATIENCE = timedelta(minutes=10)


class NobodyCame(RuntimeError):
    """Other processes of the world did not begin in time."""


@contextmanager
def joined_world(meeting_seconds: float = MEETING_SECONDS) -> Iterator[None]:
    """Join the world that torchrun or Slurm described in the environment, or be a world of one without any socket.

    The processes wait `meeting_seconds` for each other to begin; NobodyCame after that. Nested in itself this does
    nothing, so that one world can be laid out several times, one after the other.
    """
    if dist.is_initialized():
        yield
        return
    cpu_backend.install()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        # Transformer Engine asks for TF32 in all products of fp32 matrices, whatever torch says: relative errors of
        # 1e-3 where fp32 was chosen. cuBLAS reads this when it is first used.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "WORLD_SIZE" in os.environ:
        store, rank, size = _meet(meeting_seconds)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=_COLLECTIVE_PATIENCE
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _meet(seconds: float) -> tuple[dist.Store, int, int]:
    """The store that all processes speak through, once all of them do, and rank and size of the world."""
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
    except dist.DistError as problem:
        others = int(os.environ["WORLD_SIZE"]) - 1
        raise NobodyCame(
            f"process {os.environ['RANK']} waited {seconds:g} s in vain for the other {others} to begin "
            f"({str(problem).splitlines()[0]})"
        ) from problem
    store.set_timeout(_COLLECTIVE_PATIENCE)
    return store, rank, size


def reset_seeds(seed: int) -> None:
    """Seed every generator that a stage may draw from; model-parallel ranks get Megatron's per-rank offsets."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _leave_groups(groups: Sequence[dist.ProcessGroup | None]) -> None:
    """Megatron forgets its groups without ending them, and each keeps threads; None stands for the whole world."""
    for group in groups:
        if group is not None:
            dist.destroy_process_group(group)


@contextmanager
def model_parallel(
    layout: ParallelLayout = ONE_PROCESS, *, seed: int = 0, meeting_seconds: float = MEETING_SECONDS
) -> Iterator[torch.device]:
    """Process groups for `layout` for the duration of the block, as `joined_world`; yields the models' device."""
    cpu_backend.install()
    from megatron.core import parallel_state

    logging.getLogger("megatron").setLevel(logging.ERROR)
    with joined_world(meeting_seconds):
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
            yield (
                torch.device("cuda", torch.cuda.current_device())
                if torch.cuda.is_available()
                else torch.device("cpu")
            )
        finally:
            _leave_groups(parallel_state._global_process_group_list or [])
            parallel_state.destroy_model_parallel()
