"""Disk errors in a sentence that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MENDS = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EROFS: "remount it writable or choose another folder",
    errno.EACCES: "make it writable or choose another folder",
    errno.EPERM: "make it writable or choose another folder",
    errno.ENOTDIR: "move the file away that stands where a folder should be",
    errno.EEXIST: "move the file away that stands where a folder should be",
}


class StorageError(OSError):
    """The run folder could not be read or written; the message is one sentence with the mend."""


def storage_sentence(folder: Path, error: OSError) -> str:
    """Why `folder` could not be used and the mend, without a full stop."""
    cause = error.strerror or str(error)
    place = f"{folder} cannot be written: {cause}" + (f" ({error.filename})" if error.filename else "")
    mend = _MENDS.get(error.errno or 0, "check the disk")
    return f"{place}; {mend}, then run the same command again: finished stages are kept"


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn any OSError of the body into a StorageError about `folder`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(storage_sentence(folder, error)) from error
