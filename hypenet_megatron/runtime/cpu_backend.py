"""Runs Megatron-Core on CPU with gloo, without changes to Megatron's files.

Megatron relies on CUDA in four ways that need a substitute on a machine without a GPU:

1. functions of `torch.cuda` (current_device, synchronize, streams, events, RNG state): replaced by stand-ins;
2. `device="cuda"` literals, `Tensor.cuda()`, `Tensor.type() == "torch.cuda.FloatTensor"`, pinned memory: rewritten by a
   TorchFunctionMode;
3. the tensor-parallel RNG tracker, which forks the CUDA generator: pointed at the CPU generator;
4. the distributed optimizer's checkpoint code, which expects Adam without a `step` tensor per parameter.

`install()` does nothing if CUDA is available, so this module does not affect GPU runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _names_cuda(device: Any) -> bool:
    return str(device).startswith("cuda") if isinstance(device, (str, torch.device)) else False


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Rewrites requests for CUDA tensors to CPU tensors (point 2 above)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func in (torch.Tensor.pin_memory, torch.Tensor.cuda):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


class _Finished:
    """A CUDA stream or event without pending work."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Finished:
        return self

    def query(self) -> bool:
        return True


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _set_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _replace_cuda_functions() -> None:
    stand_ins: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "current_stream": _Finished,
        "default_stream": _Finished,
        "stream": lambda _: contextlib.nullcontext(),
        "Stream": _Finished,
        "Event": _Finished,
        "manual_seed": _set_seed,
        "manual_seed_all": _set_seed,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, stand_ins[name])
    torch.cuda.nvtx.range_push = lambda _: 0
    torch.cuda.nvtx.range_pop = lambda: 0


def _point_rng_tracker_at_cpu() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state

    @contextlib.contextmanager
    def fork(self: Any, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        # Megatron's fork restores the CPU generator as unrelated host state. Here the CPU generator is the state.
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    megatron_random.CudaRNGStatesTracker.fork = fork


_installed: _CudaNamesMeanCpu | None = None


def install() -> bool:
    """Patch this process so that Megatron-Core runs on CPU. Idempotent; returns True if it changed anything."""
    global _installed
    if torch.cuda.is_available() or _installed is not None:
        return False
    _replace_cuda_functions()
    _point_rng_tracker_at_cpu()
    _installed = _CudaNamesMeanCpu()
    _installed.__enter__()
    return True
