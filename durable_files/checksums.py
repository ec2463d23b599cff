"""Checksums of files and folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from durable_files.publish import read_json, write_json


def sha256_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True)
class FolderManifest:
    """Size in bytes and SHA-256 of every file of a folder, stored as MANIFEST.json in that folder."""

    files: dict[str, tuple[int, str]]

    FILE_NAME = "MANIFEST.json"

    @classmethod
    def write(cls, folder: Path, known: Mapping[str, tuple[int, str]] = {}) -> FolderManifest:
        """Store the manifest in `folder`. Hashes every file below it, except those with entries in `known`."""
        others = {
            str(path.relative_to(folder)): (path.stat().st_size, sha256_file(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in known and path.name != cls.FILE_NAME
        }
        manifest = cls({**known, **others})
        write_json(folder / cls.FILE_NAME, manifest.files)
        return manifest

    @classmethod
    def read(cls, folder: Path) -> FolderManifest:
        """Read the manifest of `folder`. ValueError if it is missing, malformed, or names files outside the folder."""
        path = folder / cls.FILE_NAME
        content = read_json(path)
        try:
            manifest = cls({name: (int(size), str(digest)) for name, (size, digest) in content.items()})
        except (AttributeError, TypeError, ValueError) as problem:
            raise ValueError(
                f"{path} is damaged: it is not a list of files with sizes and checksums ({problem})"
            ) from None
        outside = [name for name in manifest.files if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            raise ValueError(f"{path} is damaged: it names {outside[0]!r}, which is not in its folder")
        return manifest

    def share(self, part: int, parts: int) -> FolderManifest:
        """The files of part number `part` of `parts`: every `parts`-th file in the order of names."""
        return FolderManifest({name: self.files[name] for name in sorted(self.files)[part::parts]})

    def problems(self, folder: Path, *, contents: bool = True) -> Iterator[str]:
        """Yield one sentence per file that is missing or has another size or, if `contents`, another checksum."""
        for name, (size, digest) in self.files.items():
            path = folder / name
            if not path.is_file():
                yield f"{path} is missing"
            elif path.stat().st_size != size:
                yield f"{path} has {path.stat().st_size} bytes instead of {size}"
            elif contents and sha256_file(path) != digest:
                yield f"{path} does not match its checksum"
