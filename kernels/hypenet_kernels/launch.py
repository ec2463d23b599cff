"""Kernel launches that skip Triton's lookup.

Triton inspects every argument of every call to find the compiled kernel. For short sequences this takes longer than the
kernel runs. A `PreparedLaunch` looks the kernel up once; its owner keeps one for every layout of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


class PreparedLaunch:
    """A kernel with all arguments bound, except for the leading tensors.

    Args:
        kernel: a `triton.jit` function whose parameters are tensors, then `arguments`, then constexprs.
        grid: number of programs along each axis.
        arguments: strides and scalars that follow the tensors.
        constants: the constexprs, in the order of the signature.
        options: options of the compilation, such as num_warps.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        **options: Any,
    ):
        self._first = lambda *tensors: kernel[grid](*tensors, *arguments, **constants, **options)
        self._grid = grid
        self._rest = (*arguments, *constants.values())
        self._again: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Run on the current CUDA stream. The tensors must be aligned like those of the first call."""
        if self._again is not None:
            self._again(*tensors, *self._rest)
            return
        compiled = self._first(*tensors)
        if compiled is not None:  # the interpreter compiles nothing
            self._again = compiled[self._grid]


def layout_key(*tensors: Tensor) -> tuple[Hashable, ...]:
    """What a launch depends on in tensors of one shape: the shape, dtypes, strides and alignment."""
    return tensors[0].shape, *[(x.dtype, x.stride(), x.data_ptr() % 16 == 0) for x in tensors]
