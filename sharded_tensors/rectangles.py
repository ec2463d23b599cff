"""Boxes of tensors, and the runs of matrix rows that they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sharded_tensors.views import TensorInfo, TensorView


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: its first element and its shape, both with all axes of the whole tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, info: TensorInfo) -> Chunk:
        return cls((0,) * len(info.shape), info.shape)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def piece(self, axis: int, index: int, pieces: int) -> Chunk:
        """Piece `index` of `pieces` equal ones along `axis`; ValueError if they cannot be equal."""
        axis %= len(self.shape)
        size, rest = divmod(self.shape[axis], pieces)
        if rest:
            raise ValueError(
                f"an axis of length {self.shape[axis]} cannot be divided into {pieces} equal parts; "
                "choose another layout"
            )
        start = self.offset[axis] + index * size
        return Chunk(
            (*self.offset[:axis], start, *self.offset[axis + 1 :]),
            (*self.shape[:axis], size, *self.shape[axis + 1 :]),
        )

    def row_runs(self, info: TensorInfo) -> list[tuple[int, int]]:
        """Rows (start, stop) of the tensor as a matrix that the chunk has a part of, in order."""
        axes = list(zip(self.offset, self.shape, info.shape, strict=True))
        return _runs(axes[:-1] if len(axes) > 1 else axes)

    def columns(self, info: TensorInfo) -> tuple[int, int]:
        if len(info.shape) < 2:
            return 0, 1
        return self.offset[-1], self.offset[-1] + self.shape[-1]

    def blocks(self, view: TensorView, name: str) -> Iterator[Tensor]:
        """The chunk of a tensor of `view`, as blocks of rows that follow one another in the chunk."""
        info = view.infos[name]
        first, last = self.columns(info)
        for start, stop in self.row_runs(info):
            for block in view.rows(name, start, stop):
                yield block if last - first == info.columns else block[:, first:last]


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
