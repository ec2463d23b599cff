"""What a run reads from outside: the teacher, the tokenizer and the text, each identified by the content of its files.

A file is read once for its checksum, when a run first meets it, and remembered in `sources.json` of the run folder.
Later it is recognised by size, modification time and inode, so looking at 10 TB of text costs stat calls. What another
run of the same runs folder has read counts too.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from durable_files import read_json, write_json
from halo_cluster import input_hash
from hypenet_tools.hugging_face.aux_files import AUX_FILES
from terminal_output import ProgressBar
from tokenized_data.text import SUFFIXES

SOURCES_FILE = "sources.json"
Contents = Literal["weights", "tokenizer", "export files", "text"]
# Nothing else in the folders of sources matters: neither notes, nor .git, nor a hub's metadata.
_PATTERNS: dict[Contents, tuple[str, ...]] = {
    "weights": ("*.safetensors", "*.safetensors.index.json", "config.json"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
    "export files": AUX_FILES,
    "text": tuple(f"**/*{suffix}" for suffix in SUFFIXES),
}
_CHUNK_BYTES = 1 << 23
_SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Source:
    """The files in `path` (a folder, or one file) of the kind `contents`. `key` is the recipe's."""

    key: str
    path: Path
    contents: Contents

    def files(self) -> dict[str, Path]:
        """Files by their names in the folder, in a fixed order; empty if there are none."""
        if self.path.is_file():
            return {self.path.name: self.path}
        found = {path for pattern in _PATTERNS[self.contents] for path in self.path.glob(pattern)}
        return {path.relative_to(self.path).as_posix(): path for path in sorted(found) if path.is_file()}

    @property
    def name(self) -> str:
        """By which a run remembers it."""
        return f"{self.contents} of {self.path.absolute()}"


# Source, file in it, size in bytes, modification time in ns, inode. Whatever has the same key has the same content.
_Key = tuple[str, str, int, int, int]


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _key(source: Source, file: str, path: Path) -> _Key:
    return source.name, file, *_stamp(path)


class SourceChecksums:
    """SHA-256 of the files of a run's sources, as far as they were read."""

    def __init__(self, run_folder: Path) -> None:
        self._file = run_folder / SOURCES_FILE
        # By source and file: size, modification time, inode and checksum.
        self._remembered: dict[str, dict[str, list[Any]]] = read_json(self._file) if self._file.exists() else {}
        self._checksums: dict[_Key, str] = {}
        for path in run_folder.parent.glob(f"*/{SOURCES_FILE}"):
            with suppress(OSError, ValueError):  # another run's file, which only saves reading
                for source, files in read_json(path).items():
                    self._checksums |= {(source, file, *stamp): sha for file, (*stamp, sha) in files.items()}

    def digest(self, source: Source) -> str | None:
        """Identity of the files of `source` by name and content; None if one of them has to be read first.

        Files that are all gone count as they were: what was made of them is still there.
        """
        files = source.files()
        if files:
            checksums = {file: self._checksums.get(_key(source, file, path)) for file, path in files.items()}
        else:
            checksums = {file: seen[-1] for file, seen in self._remembered.get(source.name, {}).items()}
        return None if not checksums or None in checksums.values() else input_hash(checksums)

    def read(self, sources: Sequence[Source], console: Console) -> None:
        """Read every file of `sources` that is new or changed, and remember all of them in the run folder.

        ValueError if a source has no files, or if a file changes while it is read.
        """
        present: dict[_Key, Path] = {}
        for source in sources:
            files = source.files()
            if not files and source.name not in self._remembered:
                raise ValueError(f"{source.key}: {source.path} has no {source.contents}; correct the path")
            present |= {_key(source, file, path): path for file, path in files.items()}
        saved = time.monotonic()
        unread = {key: path for key, path in present.items() if key not in self._checksums}
        for key, sha256 in _sha256_of(unread, console):
            self._checksums[key] = sha256
            if time.monotonic() - saved > _SAVE_SECONDS:
                self._remember(present)
                saved = time.monotonic()
        self._remember(present)

    def _remember(self, present: Iterable[_Key]) -> None:
        """Remember what is known of the files `present`, instead of what was known of their sources before."""
        seen: dict[str, dict[str, list[Any]]] = {source: {} for source, *_ in present}
        for key in present:
            if key in self._checksums:
                source, file, *stamp = key
                seen[source][file] = [*stamp, self._checksums[key]]
        if not seen.items() <= self._remembered.items():
            self._remembered |= seen
            write_json(self._file, self._remembered)


def _sha256_of(files: Mapping[_Key, Path], console: Console) -> Iterator[tuple[_Key, str]]:
    """Checksums as they become known. Threads suffice: hashing and reading release the interpreter's lock."""
    if not files:
        return
    stop, total = threading.Event(), sum(size for _, _, size, _, _ in files)
    with (
        ProgressBar("reading the sources", total, console, in_bytes=True) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        waiting = {pool.submit(_sha256, path, bar.advance, stop): key for key, path in files.items()}
        try:
            for future in as_completed(waiting):
                key = waiting[future]
                try:
                    sha256, stamp = future.result(), _stamp(files[key])
                except OSError as error:
                    raise ValueError(f"{files[key]} cannot be read ({error.strerror}); correct that") from None
                if stamp != key[2:]:
                    raise ValueError(f"{files[key]} changed while it was read; try again when it is complete")
                yield key, sha256
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _sha256(path: Path, advance: Callable[[int], None], stop: threading.Event) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while not stop.is_set() and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()
