"""Atomic publication of files and folders."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPORARY_MARK = ".unfinished-"
RETIRED_MARK = ".retired"


def temporary_sibling(target: Path) -> Path:
    """A fresh name beside `target` (same file system, so that a rename is atomic)."""
    return target.with_name(f"{target.name}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}")


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            _fsync_path(Path(root) / name)
        _fsync_path(Path(root))


def _write_through(path: Path, content: bytes) -> None:
    with open(path, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either what it held before or all of `content`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        _write_through(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_path(path.parent)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, _json_text(content))


def _json_text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Parse `path`; ValueError names the file and the mend when it is missing, empty or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the folder, or run the step that writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or delete it and rerun") from None


def publish_folder(temporary: Path, final: Path) -> None:
    """Make a finished folder visible under its final name: fsync all of it, rename, fsync the parent.

    An older folder of the same name is replaced; at no moment does `final` name a half-written folder. Killed between
    the two renames of a replacement, the old folder stays as `final`.retired and `discard_leftovers` brings it back.
    """
    fsync_tree(temporary)
    if final.exists():
        retired = final.with_name(final.name + RETIRED_MARK)
        os.rename(final, retired)
        os.rename(temporary, final)
        shutil.rmtree(retired)
    else:
        os.rename(temporary, final)
    _fsync_path(final.parent)


def publish_once(path: Path, content: Any) -> bool:
    """`publish_text_once` of JSON."""
    return publish_text_once(path, _json_text(content))


def publish_text_once(path: Path, text: str) -> bool:
    """Write `path` exactly once, even when several writers race; True for the one that won.

    A hard link to a fsynced temporary file fails if the name exists, also over NFS, where O_EXCL and flock have a
    worse record.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        _write_through(temporary, text.encode())
        os.link(temporary, path)
        return True
    except FileExistsError:
        # Over NFS the reply to a link that succeeded may be lost and the retry refused; the link count tells.
        return os.stat(temporary).st_nlink == 2
    finally:
        temporary.unlink(missing_ok=True)
        _fsync_path(path.parent)


def _unless_gone(function: Callable[..., Any], path: str, problem: BaseException) -> None:
    if not isinstance(problem, FileNotFoundError):
        raise problem


def discard_leftovers(folder: Path) -> list[Path]:
    """Remove what killed writers left directly in `folder`; returns what was removed.

    A folder whose replacement was cut short is brought back first. Something else may be removing the same.
    """
    for retired in sorted(folder.glob(f"*{RETIRED_MARK}")) if folder.is_dir() else []:
        original = retired.with_name(retired.name.removesuffix(RETIRED_MARK))
        if original.exists():
            shutil.rmtree(retired)
        else:
            os.rename(retired, original)
    removed = []
    for entry in sorted(folder.glob(f"*{TEMPORARY_MARK}*")) if folder.is_dir() else []:
        if entry.is_dir():
            shutil.rmtree(entry, onexc=_unless_gone)
        else:
            entry.unlink(missing_ok=True)
        removed.append(entry)
    return removed
