"""Safetensors files to be written: which tensors from where, and the writing, block by block, hashed on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from durable_files import temporary_sibling
from sharded_tensors.direct_file import DirectFile
from sharded_tensors.index import Index, StoredRectangle, Sums, stored_name
from sharded_tensors.rectangles import Rectangle, TensorInfo
from sharded_tensors.safetensors_format import DTYPE_CODES
from sharded_tensors.views import TensorView

Advance = Callable[[int], None]  # told the number of bytes done


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file to be written: a rectangle of the tensor `name` of a view, stored in `dtype`."""

    view: TensorView
    name: str
    rectangle: Rectangle
    dtype: torch.dtype

    @classmethod
    def entire(cls, view: TensorView, name: str, dtype: torch.dtype | None = None) -> FileTensor:
        """All of a tensor; `dtype` None keeps its own."""
        info = view.infos[name]
        return cls(view, name, Rectangle.covering(info), dtype or info.dtype)

    @property
    def stored_name(self) -> str:
        return stored_name(self.name, self.rectangle, self.view.infos[self.name])

    @property
    def nbytes(self) -> int:
        return self.rectangle.elements * self.dtype.itemsize

    def data(self) -> Iterator[np.ndarray]:
        """The bytes of the tensor in order. Each array is valid until the next one is asked for."""
        window: Tensor | None = None  # pinned memory, through which blocks come from a GPU
        for block in self.view.rectangle(self.name, self.rectangle):
            flat = block.to(self.dtype).reshape(-1).view(torch.uint8)
            if flat.is_cuda:
                if window is None or len(window) < len(flat):
                    window = torch.empty(len(flat), dtype=torch.uint8, pin_memory=True)
                flat = window[: len(flat)].copy_(flat, non_blocking=True)
                torch.cuda.current_stream().synchronize()
            yield flat.numpy()


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file to be written: its name in the folder, and its tensors in their order."""

    name: str
    tensors: Sequence[FileTensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def _header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in self.tensors:
            entries[tensor.stored_name] = {
                "dtype": DTYPE_CODES[tensor.dtype],
                "shape": tensor.rectangle.shape,
                "data_offsets": [at, at + tensor.nbytes],
            }
            at += tensor.nbytes
        assert len(entries) == len(self.tensors) + 1, f"{self.name} names a tensor twice"
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of their element size
        return len(text).to_bytes(8, "little") + text

    def write(self, folder: Path, advance: Advance = lambda count: None) -> tuple[int, str]:
        """Write the file under a temporary name, fsync, rename. Returns its size in bytes and its SHA-256.

        Hashing, copying and writing release Python's lock, so that training can go on in another thread. An OSError
        names the file.
        """
        path = folder / self.name
        temporary = temporary_sibling(path)
        header = self._header()
        try:
            with DirectFile(temporary) as file:
                file.write(header)
                for tensor in self.tensors:
                    for data in tensor.data():
                        file.write(data)
                        advance(len(data))
                digest = file.finish()
            assert file.size == len(header) + self.nbytes, f"{path} got {file.size} bytes"
            os.replace(temporary, path)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return file.size, digest


def index_of(files: Iterable[TensorFile]) -> Index:
    """The index of files, written or to be written, without metadata."""
    tensors: dict[str, TensorInfo] = {}
    rectangles: dict[str, list[StoredRectangle]] = {}
    for file in files:
        for tensor in file.tensors:
            tensors[tensor.name] = TensorInfo(tensor.view.infos[tensor.name].shape, tensor.dtype)
            stored = StoredRectangle(file.name, tensor.rectangle)
            rectangles.setdefault(tensor.name, []).append(stored)
    return Index(tensors, rectangles)


def write_files(folder: Path, files: Sequence[TensorFile]) -> tuple[Index, Sums]:
    """Write files one after another; returns their index, and size and SHA-256 of each."""
    return index_of(files), {file.name: file.write(folder) for file in files}


def fill_files(tensors: Iterable[FileTensor], max_bytes: int) -> list[tuple[FileTensor, ...]]:
    """Group tensors, in order, into files that exceed `max_bytes` only if one tensor alone does.

    Within a file wider dtypes come first, so that every tensor is aligned.
    """
    groups: list[list[FileTensor]] = []
    used = 0
    for tensor in tensors:
        if not groups or used + tensor.nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.nbytes
    return [aligned(group) for group in groups]


def aligned(tensors: Iterable[FileTensor]) -> tuple[FileTensor, ...]:
    """Tensors of one file, those of wider dtypes first."""
    return tuple(sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize))
