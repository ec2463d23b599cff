"""Atomic publication of files and folders."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPORARY_MARK = ".unfinished-"
RETIRED_MARK = ".retired"
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)


def temporary_sibling(target: Path) -> Path:
    """A new name beside `target`, on the same file system, so that renaming it to `target` is atomic."""
    return target.with_name(f"{target.name}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}")


def temporary_folder(target: Path) -> Path:
    """Create an empty sibling of `target`, for `publish_folder`. Removes what killed writers left beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    discard_leftovers(target.parent)
    temporary = temporary_sibling(target)
    temporary.mkdir()
    return temporary


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


def _replace(path: Path, content: bytes) -> None:
    temporary = temporary_sibling(path)
    try:
        _write_through(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_path(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically: `path` has its earlier content or all of `content`. Creates the parent folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, _json_text(content))


def overwrite_json(path: Path, content: Any) -> None:
    """Like `write_json`, but FileNotFoundError if the parent folder does not exist."""
    _replace(path, _json_text(content).encode())


def _json_text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Parse `path`. ValueError, with the file and the fix, if it is missing, empty or not JSON."""
    try:
        text = path.read_text()
        if not text:  # without hard links a published name is empty for a moment
            time.sleep(0.5)
            text = path.read_text()
        return json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the folder, or run the step that writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or delete it and rerun") from None


def publish_folder(temporary: Path, final: Path) -> None:
    """Publish a finished folder under its final name: fsync all of it, rename, fsync the parent.

    Replaces an older folder of that name; `final` is never a half-written folder. After a kill between the two renames
    of a replacement, the old folder is `final`.retired, and `discard_leftovers` restores it.
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
    """`publish_text_once` for JSON."""
    return publish_text_once(path, _json_text(content))


def publish_text_once(path: Path, text: str) -> bool:
    """Write `path` exactly once, even if several writers race. Returns True for the one that won.

    `path` becomes a hard link to a flushed temporary file, so it appears complete or not at all. Linking fails if the
    name exists, also over NFS. If the file system refuses hard links, the winner is the process that creates the name
    (O_CREAT | O_EXCL); it then renames its temporary file over it. Exactly one process wins there too, and no reader
    sees part of the content. The file is empty for a moment, which `read_json` waits for. A kill at that moment leaves
    it empty; it then has to be removed by hand.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        _write_through(temporary, text.encode())
        return _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _fsync_path(path.parent)


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        # Over NFS, the reply to a successful link can get lost and the retry fail. The link count shows the truth.
        return os.stat(temporary).st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        return False
    try:
        os.replace(temporary, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def _unless_gone(function: Callable[..., Any], path: str, problem: BaseException) -> None:
    if not isinstance(problem, FileNotFoundError):
        raise problem


def discard_leftovers(folder: Path) -> list[Path]:
    """Remove what killed writers left directly in `folder`, and return what was removed.

    First restores a folder whose replacement was interrupted. Another process may remove the same files concurrently.
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
