"""Encoded documents of one text file, on their way from a worker process to the writer of the store.

<folder>/tokens    little-endian uint32, the documents one after another
        /lengths   little-endian int64, tokens of each document
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from durable_files import publish_folder, temporary_sibling


def write_encoded(folder: Path, documents: Iterable[np.ndarray]) -> None:
    """Publish `folder` with the token ids uint32 of each document. Memory holds one document."""
    temporary = temporary_sibling(folder)
    temporary.mkdir(parents=True)
    lengths = []
    with open(temporary / "tokens", "wb") as file:
        for ids in documents:
            file.write(ids.astype("<u4").tobytes())
            lengths.append(len(ids))
    (temporary / "lengths").write_bytes(np.array(lengths, "<i8").tobytes())
    publish_folder(temporary, folder)


def read_encoded(folder: Path) -> Iterator[np.ndarray]:
    """Token ids uint32 of each document. ValueError if the sizes of the two files do not match."""
    lengths = np.fromfile(folder / "lengths", "<i8")
    if (size := (folder / "tokens").stat().st_size) != 4 * lengths.sum():
        raise ValueError(
            f"{folder / 'tokens'} has {size} bytes instead of {4 * lengths.sum()}; remove {folder.parent}"
        )
    with open(folder / "tokens", "rb") as file:
        for length in lengths:
            yield np.fromfile(file, "<u4", int(length))
