"""Checksums of files and of entire folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from durable_files.publish import read_json, write_json


def sha256_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True)
class FolderManifest:
    """Size in bytes and SHA-256 of every file of a folder, stored in it as MANIFEST.json."""

    files: dict[str, tuple[int, str]]

    FILE_NAME = "MANIFEST.json"

    @classmethod
    def write(cls, folder: Path) -> FolderManifest:
        """Hash every file below `folder` and store the manifest in it."""
        files = {
            str(path.relative_to(folder)): (path.stat().st_size, sha256_file(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != cls.FILE_NAME
        }
        manifest = cls(files)
        manifest.save(folder)
        return manifest

    def save(self, folder: Path) -> None:
        """Store the manifest of files that were hashed while they were written."""
        write_json(folder / self.FILE_NAME, {name: list(entry) for name, entry in self.files.items()})

    @classmethod
    def read(cls, folder: Path) -> FolderManifest:
        """ValueError if it is missing, not a manifest, or names files outside its folder."""
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

    def problems(self, folder: Path) -> Iterator[str]:
        """One sentence per file that is missing or has another size or content."""
        for name, (size, digest) in self.files.items():
            path = folder / name
            if not path.is_file():
                yield f"{path} is missing"
            elif path.stat().st_size != size:
                yield f"{path} has {path.stat().st_size} bytes instead of {size}"
            elif sha256_file(path) != digest:
                yield f"{path} does not match its checksum"
