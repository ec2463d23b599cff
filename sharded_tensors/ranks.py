"""Small agreements between the processes of a run. All of them have to make the same calls in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def on_first_rank[T](work: Callable[[], T]) -> T:
    """Run `work` in the first process alone; all get its result, or fail if it failed.

    RuntimeError in the others; of the operating system's errors the same one, for it is about a disk that all share.
    """
    outcome: list[Any] = [None, None, None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as problem:
            error = problem
            outcome[1] = str(problem)
            if isinstance(problem, OSError) and problem.errno is not None:
                outcome[2] = (problem.errno, problem.strerror, problem.filename)
    dist.broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[2] is not None:
        raise OSError(*outcome[2])
    if outcome[1] is not None:
        raise RuntimeError(f"the first process failed: {outcome[1]}")
    return outcome[0]


def from_all_ranks[T](own: T) -> list[T]:
    """What every process has, by rank."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    return everybody


def highest(flags: Sequence[int]) -> list[int]:
    """The maximum over all processes of every flag: the tiny collective of each step."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    everybody = torch.tensor(list(flags), dtype=torch.int32, device=device)
    dist.all_reduce(everybody, op=dist.ReduceOp.MAX)
    return [int(flag) for flag in everybody.tolist()]
