"""Turns errors of the disk into a sentence that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FIXES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EROFS: "remount it writable or choose another folder",
    errno.EACCES: "make it writable or choose another folder",
    errno.EPERM: "make it writable or choose another folder",
    errno.ENOTDIR: "move the file that is in the place of a folder",
    errno.EEXIST: "move the file that is in the place of a folder",
}


class StorageError(OSError):
    """The run folder could not be read or written; the message is one sentence with the fix."""


def storage_sentence(folder: Path, error: OSError) -> str:
    """Why `folder` could not be used and how to fix it, without a full stop."""
    cause = error.strerror or str(error)
    place = f"{folder} cannot be written: {cause}" + (f" ({error.filename})" if error.filename else "")
    fix = _FIXES.get(error.errno or 0, "check the disk")
    return f"{place}; {fix}, then run the same command again: finished stages and checkpoints are kept"


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn any OSError of the body into a StorageError about `folder`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(storage_sentence(folder, error)) from error
