"""Writing large files past the page cache, hashed on the way.

The page cache costs more than the disk here: a second copy of everything, and the eviction of what others use. So
bytes are gathered in a buffer of whole pages, which is hashed and handed to the disk (O_DIRECT) while the next one
fills. File systems that know no O_DIRECT get the same buffers through the cache.
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

BUFFER_BYTES = 4 * 2**20


class DirectFile:
    """A new file, written once from beginning to end; use as a context manager, then `finish`."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError:
            path.unlink(missing_ok=True)  # some file systems make the file, then refuse the flag
            self._descriptor = os.open(path, flags, 0o666)
        self._buffers = [mmap.mmap(-1, BUFFER_BYTES) for _ in range(2)]
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

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. Raises the OSError of an earlier write, too."""
        at = 0
        while at < len(data):
            count = min(len(data) - at, BUFFER_BYTES - self._used)
            self._buffers[0][self._used : self._used + count] = data[at : at + count]
            at, self._used = at + count, self._used + count
            if self._used == BUFFER_BYTES:
                self._hand_over()

    def finish(self) -> str:
        """Write the rest, flush to the disk; the SHA-256 of all that was written."""
        self._hand_over()
        self._wait()
        os.ftruncate(self._descriptor, self.size)  # the last page was written whole
        os.fsync(self._descriptor)
        return self._digest.hexdigest()

    def _hand_over(self) -> None:
        """Hash the filled buffer and have it written while the other one fills."""
        filled = memoryview(self._buffers[0])
        self._digest.update(filled[: self._used])
        self.size += self._used
        self._wait()
        pages = -(-self._used // mmap.PAGESIZE) * mmap.PAGESIZE
        self._written = self._thread.submit(self._write_all, filled[:pages])
        self._buffers.reverse()
        self._used = 0

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def _write_all(self, data: memoryview) -> None:
        while data:  # a nearly full disk takes a part, then refuses the rest
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._leave_direct():
                    raise

    def _leave_direct(self) -> bool:
        """Go on through the page cache; False if that is where we are already.

        A part that is no whole number of blocks (a quota, a limit on file sizes) leaves a position at which the disk
        takes nothing directly. The cache takes the rest, or says what the matter is.
        """
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)
