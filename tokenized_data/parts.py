"""Encoded documents on their way into a store: a worker leaves those of one text file, the store's writer takes them.

<part>/tokens    little-endian uint32, one document after another
      /lengths   little-endian int64, tokens of each
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from durable_files import publish_folder, temporary_sibling


def write_part(folder: Path, documents: Iterable[np.ndarray]) -> None:
    """Publish `folder` with ids uint32 of each document; memory holds one of them."""
    temporary = temporary_sibling(folder)
    temporary.mkdir(parents=True)
    lengths = []
    with open(temporary / "tokens", "wb") as file:
        for ids in documents:
            file.write(ids.astype("<u4").tobytes())
            lengths.append(len(ids))
    (temporary / "lengths").write_bytes(np.array(lengths, "<i8").tobytes())
    publish_folder(temporary, folder)


def read_part(folder: Path) -> Iterator[np.ndarray]:
    """Ids uint32 of each document; ValueError when the files do not belong together."""
    lengths = np.fromfile(folder / "lengths", "<i8")
    if (size := (folder / "tokens").stat().st_size) != 4 * lengths.sum():
        raise ValueError(
            f"{folder / 'tokens'} has {size} bytes instead of {4 * lengths.sum()}; remove {folder.parent}"
        )
    with open(folder / "tokens", "rb") as file:
        for length in lengths:
            yield np.fromfile(file, "<u4", int(length))
