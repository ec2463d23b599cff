"""Files written past the page cache."""

import errno
import fcntl
import hashlib
import os

import pytest

from sharded_tensors.direct_file import BUFFER_BYTES, DirectFile


def test_a_part_that_is_no_block_leaves_the_direct_path(tmp_path, monkeypatch):
    """Some file systems write up to a limit that is in the middle of a block, then refuse to go on from there."""
    write, calls = os.write, []

    def write_in_parts(descriptor, data):
        calls.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        if not calls[-1]:
            return write(descriptor, data)
        if len(calls) > 1:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(descriptor, data[: BUFFER_BYTES // 2])

    monkeypatch.setattr("sharded_tensors.direct_file.os.write", write_in_parts)
    content = os.urandom(2 * BUFFER_BYTES + 1000)
    with DirectFile(tmp_path / "file") as file:
        if not fcntl.fcntl(file._descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            pytest.skip("this file system knows no O_DIRECT")
        file.write(content)
        digest = file.finish()
    assert (tmp_path / "file").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()
    assert calls[:2] == [True, True] and not any(calls[2:])


def test_other_invalid_arguments_are_errors(tmp_path, monkeypatch):
    def refuse(descriptor, data):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("sharded_tensors.direct_file.os.write", refuse)
    with DirectFile(tmp_path / "file") as file:
        file.write(bytes(10))
        with pytest.raises(OSError, match="Invalid argument"):
            file.finish()
