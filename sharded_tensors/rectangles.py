"""Rectangles of global tensors, and the matrix rows and columns that they cover.

Every tensor is also seen as a matrix: all axes but the last are its rows. A vector is a matrix of one column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that may not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Rectangle:
    """A box of a global tensor: offset of its first element and size, both along every axis of that tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def covering(cls, info: TensorInfo) -> Rectangle:
        """The rectangle that is the entire tensor."""
        return cls((0,) * len(info.shape), info.shape)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def divide(self, axis: int, index: int, count: int) -> Rectangle:
        """Number `index` of `count` equal rectangles along `axis`; ValueError if they cannot be equal."""
        axis %= len(self.shape)
        size, rest = divmod(self.shape[axis], count)
        if rest:
            raise ValueError(
                f"an axis of length {self.shape[axis]} cannot be divided into {count} equal parts; "
                "choose another layout"
            )
        start = self.offset[axis] + index * size
        return Rectangle(
            (*self.offset[:axis], start, *self.offset[axis + 1 :]),
            (*self.shape[:axis], size, *self.shape[axis + 1 :]),
        )

    def row_runs(self, info: TensorInfo) -> list[tuple[int, int]]:
        """The matrix rows [start, stop) of the global tensor that the rectangle touches, in ascending order."""
        axes = list(zip(self.offset, self.shape, info.shape, strict=True))
        return _runs(axes[:-1] if len(axes) > 1 else axes)

    def columns(self, info: TensorInfo) -> tuple[int, int]:
        """The matrix columns [first, last) that the rectangle has of each of its rows."""
        if len(info.shape) < 2:
            return 0, 1
        return self.offset[-1], self.offset[-1] + self.shape[-1]


def _runs(axes: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Index ranges, in a flattened array, of the box with (offset, size, length of the axis) per axis."""
    offset, size, _ = axes[0]
    if len(axes) == 1:
        return [(offset, offset + size)]
    inner = _runs(axes[1:])
    stride = math.prod(length for _, _, length in axes[1:])
    if inner == [(0, stride)]:
        return [(offset * stride, (offset + size) * stride)]
    return [
        (index * stride + start, index * stride + stop)
        for index in range(offset, offset + size)
        for start, stop in inner
    ]
