"""Tensors that lie in chunks in the safetensors files of a folder, read as if they were whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sharded_tensors.rectangles import Chunk
from sharded_tensors.safetensors_format import DTYPE_CODES, SafetensorsFiles, read_header
from sharded_tensors.views import BLOCK_BYTES, TensorInfo, TensorView, blocks


@dataclass(frozen=True)
class StoredChunk:
    """A chunk of a tensor: the tensor `name` of `file`."""

    file: str
    name: str
    chunk: Chunk


class _Piece(NamedTuple):
    """Columns first:last of a band of rows, which are rows row, row + 1, ... of a stored chunk."""

    first: int
    last: int
    stored: StoredChunk
    row: int


class ChunkedTensors(TensorView):
    """A view of tensors of which an index says where their chunks are; they may form any grid of rows and columns."""

    def __init__(
        self,
        folder: Path,
        index_name: str,
        infos: Mapping[str, TensorInfo],
        chunks: Mapping[str, Sequence[StoredChunk]],
    ) -> None:
        """ValueError names the file that is damaged or at odds with the index, or the tensor with a gap."""
        self.folder = folder
        self.infos = dict(infos)
        self._index_name = index_name
        self._chunks = chunks
        self._open = SafetensorsFiles()
        self._bands = {key: self._tile(key) for key in infos}
        self._require_headers()

    def _require_headers(self) -> None:
        expected: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        for key, info in self.infos.items():
            for stored in self._chunks[key]:
                entry = (DTYPE_CODES[info.dtype], stored.chunk.shape)
                expected.setdefault(stored.file, {})[stored.name] = entry
        for file, tensors in expected.items():
            found = read_header(self.folder / file)
            odd = sorted(name for name, entry in tensors.items() if found.get(name) != entry)
            if odd:
                raise ValueError(
                    f"{self.folder / file} and {self._index_name} disagree about the tensor {odd[0]}; copy the "
                    "folder again"
                )

    def _tile(self, key: str) -> list[tuple[int, int, list[_Piece]]]:
        """The chunks of a tensor as bands of rows, each divided into columns; ValueError at a gap or an overlap."""
        info = self.infos[key]
        bands: dict[tuple[int, int], list[_Piece]] = {}
        for stored in self._chunks[key]:
            row = 0
            for run in stored.chunk.row_runs(info):
                bands.setdefault(run, []).append(_Piece(*stored.chunk.columns(info), stored, row))
                row += run[1] - run[0]
        tiled = [
            (start, stop, sorted(pieces, key=lambda p: p[:2]))
            for (start, stop), pieces in sorted(bands.items())
        ]
        rows_end = 0
        for start, stop, pieces in tiled:
            columns_end = 0
            for piece in pieces:
                if piece.first != columns_end:
                    break
                columns_end = piece.last
            if start != rows_end or columns_end != info.columns:
                break
            rows_end = stop
        if rows_end != info.rows:
            raise ValueError(
                f"{self.folder / self._index_name}: the chunks of {key} leave a gap or overlap; write the folder again"
            )
        return tiled

    def rows(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        for band_start, band_stop, pieces in self._bands[name]:
            first, last = max(start, band_start), min(stop, band_stop)
            if first >= last:
                continue
            parts = []
            for piece in pieces:
                stored = self._open.tensor(self.folder / piece.stored.file, piece.stored.name)
                row = piece.row + first - band_start
                parts.append(stored.view(-1, piece.last - piece.first)[row : row + last - first])
            if len(parts) == 1:
                yield from blocks(parts[0])
                continue
            info = self.infos[name]
            rows = max(1, BLOCK_BYTES // (info.columns * info.dtype.itemsize))
            for together in zip(*(part.split(rows) for part in parts), strict=True):
                yield torch.cat(together, dim=1)
