"""Tensors that are read a block of rows at a time, wherever they are stored.

Fusing q, k and v, cloning heads, stacking experts and dividing for tensor parallelism are all runs of matrix rows in
another order. A conversion is therefore a view of a view, and costs nothing until its rows are written. No tensor has
to be in memory as a whole, and rows of a memory-mapped file are not copied on the way.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sharded_tensors.rectangles import Rectangle, TensorInfo

BLOCK_BYTES = 8 * 2**20


def blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Split a matrix into runs of rows of about BLOCK_BYTES."""
    rows = max(1, BLOCK_BYTES // max(1, matrix.shape[1] * matrix.dtype.itemsize))
    yield from matrix.split(rows)


class TensorView(Mapping[str, Tensor]):
    """Tensors by name that are read on demand. `infos` describes all of them; `view[name]` reads one entirely."""

    infos: Mapping[str, TensorInfo]

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        """Blocks [n, columns] that together are the matrix rows start:stop of a tensor."""

    def rectangle(self, name: str, rectangle: Rectangle) -> Iterator[Tensor]:
        """Blocks [n, columns of the rectangle] that together are a rectangle of a tensor, in its own row order."""
        info = self.infos[name]
        first, last = rectangle.columns(info)
        for start, stop in rectangle.row_runs(info):
            for block in self.rows(name, start, stop):
                yield block if last - first == info.columns else block[:, first:last]

    def __getitem__(self, name: str) -> Tensor:
        info = self.infos[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        copy_blocks(self.rows(name, 0, info.rows), tensor)
        return tensor

    @property
    def elements(self) -> int:
        """Number of elements of all tensors."""
        return sum(info.elements for info in self.infos.values())

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def copy_blocks(source: Iterator[Tensor], target: Tensor) -> None:
    """Fill a contiguous tensor with blocks of rows, in its own dtype."""
    at, flat = 0, target.view(-1)
    for block in source:
        flat[at : at + block.numel()].view(block.shape).copy_(block)
        at += block.numel()
    assert at == target.numel(), f"{at} elements were read for a tensor of {target.numel()}"


class TensorsInMemory(TensorView):
    """A dict of tensors as a view. Other entries of a state dict, such as Megatron's _extra_state, are left out."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: t.detach() for name, t in tensors.items() if isinstance(t, Tensor)}
        self.infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        yield from blocks(self.tensors[name].reshape(-1, self.infos[name].columns)[start:stop])

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def as_view(tensors: Mapping[str, Tensor]) -> TensorView:
    return tensors if isinstance(tensors, TensorView) else TensorsInMemory(tensors)


class LocalRectangles(TensorView):
    """What one rank holds of global tensors: contiguous tensors by (name, rectangle). Only these can be read."""

    def __init__(
        self, infos: Mapping[str, TensorInfo], tensors: Mapping[tuple[str, Rectangle], Tensor]
    ) -> None:
        self.infos, self.tensors = infos, tensors

    def rows(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        raise NotImplementedError("a rank does not hold entire rows of its tensors")

    def rectangle(self, name: str, rectangle: Rectangle) -> Iterator[Tensor]:
        first, last = rectangle.columns(self.infos[name])
        yield from blocks(self.tensors[name, rectangle].detach().view(-1, last - first))


@dataclass(frozen=True)
class Run:
    """Rows start:stop of a tensor of a view."""

    view: TensorView
    name: str
    start: int
    stop: int


class AssembledTensors(TensorView):
    """Tensors that are composed of runs of rows of other views' tensors. `add` each of them, then read."""

    def __init__(self) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._runs: dict[str, tuple[Run, ...]] = {}
        self._starts: dict[str, list[int]] = {}  # first row of every run, and the row after the last

    def add(self, name: str, info: TensorInfo, runs: Sequence[Run]) -> None:
        assert name not in self.infos, f"{name} is assembled twice"
        self._starts[name] = list(accumulate((run.stop - run.start for run in runs), initial=0))
        assert self._starts[name][-1] == info.rows, (
            f"{name} gets {self._starts[name][-1]} rows, not {info.rows}"
        )
        self.infos[name], self._runs[name] = info, tuple(runs)

    def take(self, view: TensorView, name: str, new_name: str | None = None) -> None:
        """Pass on a tensor of another view unchanged."""
        info = view.infos[name]
        self.add(new_name or name, info, [Run(view, name, 0, info.rows)])

    def rows(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        starts = self._starts[name]
        index = bisect_right(starts, start) - 1
        while start < stop:
            run = self._runs[name][index]
            end = min(stop, starts[index + 1])
            offset = run.start - starts[index]
            yield from run.view.rows(run.name, start + offset, end + offset)
            start, index = end, index + 1
