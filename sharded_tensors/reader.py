"""The tensors of a folder, read at any layout."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from durable_files import FolderManifest
from sharded_tensors.index import INDEX_FILE, Index, StoredRectangle, stored_name
from sharded_tensors.rectangles import Rectangle
from sharded_tensors.safetensors_format import DTYPE_CODES, open_mapped, read_header
from sharded_tensors.views import BLOCK_BYTES, TensorView, blocks

NameFilter = Callable[[str], bool]


class _Tile(NamedTuple):
    """Columns first:last of rows start:stop of a tensor, which are rows from `row` on of a stored rectangle."""

    first: int
    last: int
    start: int
    stop: int
    stored: StoredRectangle
    row: int


# A tensor cut into bands of rows: the cuts, and the tiles, side by side, of rows cuts[i]:cuts[i + 1].
_Bands = tuple[list[int], list[list[_Tile]]]


class StoredTensors(TensorView):
    """The tensors of a weights folder or training checkpoint whose names `keep` accepts.

    Opening reads index, manifest and file sizes. A file's header is checked when the file is first used.
    """

    def __init__(self, folder: Path, keep: NameFilter | None = None) -> None:
        """ValueError names the file that is missing or truncated, or the tensor that is not fully covered."""
        self.folder = folder
        self.index = Index.read(folder)
        self.manifest = FolderManifest.read(folder)
        self._require_files()
        self.infos = {name: i for name, i in self.index.tensors.items() if keep is None or keep(name)}
        self._bands = {name: self._cut(name) for name in self.infos}
        self._content: dict[str, list[tuple[str, Rectangle]]] = defaultdict(list)  # by file
        for name in self.infos:
            for stored in self.index.rectangles[name]:
                self._content[stored.file].append((name, stored.rectangle))
        self._handles: dict[str, Any] = {}

    def _require_files(self) -> None:
        for problem in self.manifest.problems(self.folder, contents=False):
            raise ValueError(f"{problem}; copy the folder again")
        named = {stored.file for of_tensor in self.index.rectangles.values() for stored in of_tensor}
        unlisted = named - self.manifest.files.keys()
        if unlisted:
            raise ValueError(
                f"{self.folder / INDEX_FILE} names {min(unlisted)}, which {FolderManifest.FILE_NAME} does not list; "
                "copy the folder again"
            )

    def _cut(self, name: str) -> _Bands:
        """Cut a tensor at every row where a rectangle begins or ends. ValueError at a gap or an overlap."""
        info = self.infos[name]
        tiles: list[_Tile] = []
        for stored in self.index.rectangles[name]:
            row = 0
            for start, stop in stored.rectangle.row_runs(info):
                tiles.append(_Tile(*stored.rectangle.columns(info), start, stop, stored, row))
                row += stop - start
        cuts = sorted({0, info.rows} | {row for tile in tiles for row in (tile.start, tile.stop)})
        number = {row: index for index, row in enumerate(cuts)}
        bands: list[list[_Tile]] = [[] for _ in cuts[1:]]
        for tile in tiles:
            for band in bands[number[tile.start] : number[tile.stop]]:
                band.append(tile)
        for band in bands:
            band.sort(key=lambda tile: tile.first)
            edges = [0, *(tile.last for tile in band)]
            if edges != [*(tile.first for tile in band), info.columns]:
                break
        else:
            if (cuts[0], cuts[-1]) == (0, info.rows):
                return cuts, bands
        raise ValueError(
            f"{self.folder / INDEX_FILE}: the rectangles of {name} leave a gap or overlap; write the folder again"
        )

    def rows(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        return self._part(name, start, stop, 0, self.infos[name].columns)

    def rectangle(self, name: str, rectangle: Rectangle) -> Iterator[Tensor]:
        first, last = rectangle.columns(self.infos[name])
        for start, stop in rectangle.row_runs(self.infos[name]):
            yield from self._part(name, start, stop, first, last)

    def _part(self, name: str, start: int, stop: int, first: int, last: int) -> Iterator[Tensor]:
        """Blocks of rows start:stop and columns first:last. Only files that hold some of them are touched."""
        cuts, bands = self._bands[name]
        index = bisect_right(cuts, start) - 1
        while start < stop:
            end = min(stop, cuts[index + 1])
            parts = []
            for tile in bands[index]:
                left, right = max(first, tile.first), min(last, tile.last)
                if left < right:
                    row = tile.row + start - tile.start
                    matrix = self._matrix(name, tile)[row : row + end - start]
                    parts.append(matrix[:, left - tile.first : right - tile.first])
            yield from _side_by_side(parts)
            start, index = end, index + 1

    def _matrix(self, name: str, tile: _Tile) -> Tensor:
        stored = stored_name(name, tile.stored.rectangle, self.infos[name])
        file = tile.stored.file
        if file not in self._handles:  # not functools.cache, whose reference cycle keeps files mapped after this view
            self._handles[file] = self._open_checked(file)
        return self._handles[file].get_tensor(stored).view(-1, tile.last - tile.first)

    def _open_checked(self, file: str) -> Any:
        found = read_header(self.folder / file)
        for name, rectangle in self._content[file]:
            info = self.infos[name]
            if found.get(stored_name(name, rectangle, info)) != (DTYPE_CODES[info.dtype], rectangle.shape):
                raise ValueError(
                    f"{self.folder / file} and {INDEX_FILE} disagree about the tensor {name}; copy the folder again"
                )
        return open_mapped(self.folder / file)

    def require_intact(self, part: int = 0, parts: int = 1) -> None:
        """Hash every `parts`-th file from number `part` on; ValueError names one that differs from its checksum."""
        for problem in self.manifest.share(part, parts).problems(self.folder):
            raise ValueError(f"{problem}; copy it again, or write the folder again")


def _side_by_side(parts: list[Tensor]) -> Iterator[Tensor]:
    """Blocks of a matrix that is given as blocks of its columns."""
    if len(parts) == 1:
        yield from blocks(parts[0])
        return
    rows = max(1, BLOCK_BYTES // sum(part.shape[1] * part.dtype.itemsize for part in parts))
    for together in zip(*(part.split(rows) for part in parts), strict=True):
        yield torch.cat(together, dim=1)
