"""Launching a kernel that was launched before, without what Triton works out anew at every call.

Triton looks at each argument of each call to find the right compiled kernel, which takes longer than a short kernel
runs. The caller's key says the same in fewer looks.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

# Beyond this many keys (shapes that come and go) they are forgotten and looked up anew; kernels stay in Triton's cache.
_MOST_KEYS = 4096
_compiled: dict[Hashable, Any] = {}


def layout_key(*tensors: Tensor) -> tuple[Hashable, ...]:
    """What compilation depends on in tensors: dtype, shape, strides (divisible by 16? one?) and alignment."""
    return tuple([(x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in tensors])


def launch(
    kernel: Any,
    key: Hashable,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    **options: Any,
) -> None:
    """Run `kernel` on the current CUDA stream.

    Args:
        kernel: a `triton.jit` function whose constexpr parameters come last.
        key: equal keys promise equal kernels: dtypes, strides, alignment and constants, and the device.
        constants: the constexpr parameters, in the order of the signature.
        options: of the compilation, such as num_warps.
    """
    known = _compiled.get((kernel, key))
    if known is not None:
        known[grid](*arguments, *constants.values())
        return
    found = kernel[grid](*arguments, **constants, **options)
    if found is None:  # the interpreter compiles nothing
        return
    if len(_compiled) >= _MOST_KEYS:
        _compiled.clear()
    _compiled[kernel, key] = found
