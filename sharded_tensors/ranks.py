"""Agreements between the processes of a run. Every process has to make the same calls in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


def from_all_ranks[T](own: T) -> list[T]:
    """What every process passes, by rank."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    return everybody


@dataclass(frozen=True)
class _Failure:
    """Why a process failed, in a form that the others can raise. An OSError stays one: its disk is shared."""

    text: str
    os_error: tuple[Any, ...] | None

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        if isinstance(error, OSError) and error.errno is not None:
            return cls(str(error), (error.errno, error.strerror, error.filename))
        return cls(f"{type(error).__name__}: {error}", None)


def results_of_all_ranks[T](own: T | BaseException) -> list[T]:
    """The results of all processes, by rank.

    If any process passes an exception, every process raises: its own exception, or else the first other one, as
    the same OSError or as a RuntimeError that names the rank.
    """
    failed = isinstance(own, BaseException)
    everybody = from_all_ranks(_Failure.of(own) if isinstance(own, BaseException) else own)
    if failed:
        raise own  # type: ignore[misc]
    for rank, outcome in enumerate(everybody):
        if isinstance(outcome, _Failure):
            raise OSError(*outcome.os_error) if outcome.os_error else RuntimeError(
                f"rank {rank} failed: {outcome.text}"
            )
    return everybody  # type: ignore[return-value]


def on_all_ranks[T](work: Callable[[], T]) -> list[T]:
    """Run `work` in every process. Returns all results by rank, or fails everywhere if it failed anywhere."""
    try:
        own: T | Exception = work()
    except Exception as error:
        own = error
    return results_of_all_ranks(own)


def on_first_rank[T](work: Callable[[], T]) -> T:
    """Run `work` in the first process. Every process gets its result, or fails if it failed."""
    return on_all_ranks(lambda: work() if dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]


def highest(flags: Sequence[int]) -> list[int]:
    """The maximum of every flag over all processes. This is the one small collective of every training step."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    everybody = torch.tensor(list(flags), dtype=torch.int32, device=device)
    dist.all_reduce(everybody, op=dist.ReduceOp.MAX)
    return [int(flag) for flag in everybody.tolist()]
