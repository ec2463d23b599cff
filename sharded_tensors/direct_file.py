"""Writing large files past the page cache, hashed on the way.

The page cache would keep a second copy of everything and evict what other processes use. Bytes are gathered in a buffer
of full pages, which is hashed and written with O_DIRECT while the other buffer fills. Where a file system does not
support O_DIRECT, the same buffers go through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

BUFFER_BYTES = 4 * 2**20


class DirectFile:
    """A new file, written once from beginning to end. Use it as a context manager and call `finish` at the end."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError:
            path.unlink(missing_ok=True)  # some file systems create the file, then refuse the flag
            self._descriptor = os.open(path, flags, 0o666)
        self._buffers = [np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8) for _ in range(2)]
        self._used = 0
        self._written: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._digest = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        os.close(self._descriptor)

    def write(self, data: bytes | np.ndarray) -> None:
        """Append bytes, or an array of uint8. Raises the OSError of an earlier write, too."""
        array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        at = 0
        while at < len(array):
            count = min(len(array) - at, BUFFER_BYTES - self._used)
            self._buffers[0][self._used : self._used + count] = array[at : at + count]
            at, self._used = at + count, self._used + count
            if self._used == BUFFER_BYTES:
                self._flush_buffer()

    def finish(self) -> str:
        """Write the rest and flush to the disk. Returns the SHA-256 of the file."""
        self._flush_buffer()
        self._wait()
        os.ftruncate(self._descriptor, self.size)  # the last page was written as a full one
        os.fsync(self._descriptor)
        return self._digest.hexdigest()

    def _flush_buffer(self) -> None:
        """Hash the filled buffer, and write it in a thread while the other one fills."""
        filled = self._buffers[0]
        self._digest.update(filled[: self._used])
        self.size += self._used
        self._wait()
        pages = -(-self._used // mmap.PAGESIZE) * mmap.PAGESIZE
        self._written = self._thread.submit(self._write_all, memoryview(filled)[:pages])
        self._buffers.reverse()
        self._used = 0

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def _write_all(self, data: memoryview) -> None:
        while data:  # a nearly full disk accepts a part, then refuses the rest
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._leave_direct():
                    raise

    def _leave_direct(self) -> bool:
        """Continue through the page cache; False if the file is written through it already.

        After a partial write (a quota, a limit on file sizes) the position may not be a multiple of the block size, and
        O_DIRECT then fails with EINVAL. The page cache accepts the rest, or reports the real error.
        """
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)
