"""Tensors that are read a few rows at a time, wherever they lie: the common ground of every conversion.

A tensor is seen as a matrix: all axes but the last are its rows (a vector is a matrix of one column). Fusing
q, k and v, cloning heads, stacking experts and cutting for tensor parallelism are then the same thing, runs of
rows in another order, and a model is converted by writing the rows of a view one block after the other. No
tensor has to exist whole, and rows of a memory-mapped file are never copied on the way.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

BLOCK_BYTES = 8 * 2**20


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


def blocks(matrix: Tensor) -> Iterator[Tensor]:
    """A matrix in runs of whole rows of about BLOCK_BYTES."""
    rows = max(1, BLOCK_BYTES // max(1, matrix.shape[1] * matrix.dtype.itemsize))
    yield from matrix.split(rows)


class TensorView(Mapping[str, Tensor]):
    """Tensors by name, none of them read before it is asked for.

    `infos` describes all of them. `rows` yields blocks [n, columns] that together are rows start:stop of the
    tensor as a matrix; `view[name]` is the tensor whole.
    """

    infos: Mapping[str, TensorInfo]

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Iterator[Tensor]: ...

    def __getitem__(self, name: str) -> Tensor:
        info = self.infos[name]
        whole = torch.empty((info.rows, info.columns), dtype=info.dtype)
        at = 0
        for block in self.rows(name, 0, info.rows):
            whole[at : at + len(block)] = block
            at += len(block)
        return whole.view(info.shape)

    @property
    def elements(self) -> int:
        """Of all tensors together."""
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


class TensorsInMemory(TensorView):
    """A dict of tensors as a view. Other entries of a state dict (Megatron's _extra_state) are no weights."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: t.detach() for name, t in tensors.items() if isinstance(t, Tensor)}
        self.infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        matrix = self.tensors[name].reshape(-1, self.infos[name].columns)
        yield from blocks(matrix[start:stop].cpu())

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def as_view(tensors: Mapping[str, Tensor]) -> TensorView:
    return tensors if isinstance(tensors, TensorView) else TensorsInMemory(tensors)


@dataclass(frozen=True)
class Run:
    """Rows start:stop of a tensor of a view."""

    view: TensorView
    name: str
    start: int
    stop: int


class AssembledTensors(TensorView):
    """Tensors put together from runs of rows of other views' tensors: `add` each, then read them like any other."""

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
        """Pass a tensor of another view on as it is."""
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
