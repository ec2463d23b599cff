"""safetensors files to be written: which tensors, from where; and the writing, block by block, hashed on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from durable_files import temporary_sibling
from sharded_tensors.direct_file import DirectFile
from sharded_tensors.rectangles import Chunk
from sharded_tensors.safetensors_format import DTYPE_CODES
from sharded_tensors.views import TensorView

Advance = Callable[[int], None]


@dataclass(frozen=True)
class ShardTensor:
    """A tensor of a file: a chunk of `key` of a view, stored as `name` in `dtype`."""

    name: str
    view: TensorView
    key: str
    chunk: Chunk
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.chunk.elements * self.dtype.itemsize

    @classmethod
    def whole(cls, view: TensorView, key: str, dtype: torch.dtype | None = None) -> ShardTensor:
        info = view.infos[key]
        return cls(key, view, key, Chunk.whole(info), dtype or info.dtype)

    def data(self) -> Iterator[memoryview]:
        for block in self.chunk.blocks(self.view, self.key):
            yield block.to(self.dtype).contiguous().view(torch.uint8).numpy().data.cast("B")


@dataclass(frozen=True)
class Shard:
    """A file: its name in the folder, and its tensors in their order."""

    name: str
    tensors: tuple[ShardTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def _header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in self.tensors:
            entries[tensor.name] = {
                "dtype": DTYPE_CODES[tensor.dtype],
                "shape": tensor.chunk.shape,
                "data_offsets": [at, at + tensor.nbytes],
            }
            at += tensor.nbytes
        assert len(entries) == len(self.tensors) + 1, f"{self.name} names a tensor twice"
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of their element size
        return len(text).to_bytes(8, "little") + text

    def write(self, folder: Path, advance: Advance) -> tuple[int, str]:
        """Write the file under a temporary name, fsync, rename. Returns its size and SHA-256.

        `advance` is told the number of bytes of every block of tensors that was written.
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


def fill_shards(tensors: Iterable[ShardTensor], max_bytes: int) -> list[tuple[ShardTensor, ...]]:
    """Tensors in order, cut so that a shard exceeds `max_bytes` only if one tensor alone does.

    Within a shard wider dtypes come first, so that every tensor is aligned.
    """
    shards: list[list[ShardTensor]] = []
    used = 0
    for tensor in tensors:
        if not shards or used + tensor.nbytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return [tuple(sorted(shard, key=lambda tensor: -tensor.dtype.itemsize)) for shard in shards]
