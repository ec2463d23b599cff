"""A lock per folder, made of ordinary files.

flock is not used, because network file systems support it unevenly or not at all. The holder is the process named in
the lock file with the highest number, until it marks the file as released or ends. A process that finds the holder gone
publishes the next number, which only one process can do (`publish_once`). The highest number is never removed before a
higher one exists, so a slow rival that publishes an old number sees the higher one and retries.

A holder that ended on this host is noticed at once. A process on another host cannot be observed; if it was killed, the
error names the lock file to remove. No result depends on the lock; it prevents wasted work and half-cleaned folders.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from durable_files.processes import ProcessIdentity
from durable_files.publish import overwrite_json, publish_once, read_json


class HeldError(ValueError):
    """The folder is held by a process that has not ended as far as is known. The message names it."""


def _locks(folder: Path, name: str) -> dict[int, Path]:
    matches = ((re.fullmatch(rf"{re.escape(name)}\.(\d+)", path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def _refuse_while_held(folder: Path, lock: Path) -> None:
    content = read_json(lock)
    owner = ProcessIdentity.from_json(content)
    if content["released"] or owner.has_ended():
        return
    if owner.is_on_this_host:
        raise HeldError(f"{folder} is in use by process {owner.pid}; wait for it, or stop it")
    raise HeldError(
        f"{folder} is in use by process {owner.pid} on {owner.host}; "
        f"wait for it, or remove {lock} if it has ended"
    )


def _acquire(folder: Path, name: str, owner: ProcessIdentity) -> Path:
    while True:
        newest, newest_path = max(_locks(folder, name).items(), default=(0, None))
        if newest_path is not None:
            try:
                _refuse_while_held(folder, newest_path)
            except ValueError:
                if newest_path.exists():
                    raise
                continue  # the next holder removed it in the meantime
        number, mine = newest + 1, folder / f"{name}.{newest + 1}"
        if not publish_once(mine, {**asdict(owner), "released": False}):
            continue
        locks = _locks(folder, name)
        if max(locks) > number:
            mine.unlink(missing_ok=True)
            continue
        for other, path in locks.items():
            if other < number:
                path.unlink(missing_ok=True)
        return mine


def refuse_while_held(folder: Path, name: str = "lock") -> None:
    """Raise HeldError, a ValueError that names the process, if a process holds `folder`."""
    locks = _locks(folder, name)
    if locks:
        newest = locks[max(locks)]
        try:
            _refuse_while_held(folder, newest)
        except ValueError:
            if newest.exists():  # otherwise the next holder removed it in the meantime
                raise


@contextmanager
def exclusive(folder: Path, name: str = "lock", *, timeout: float = 0.0) -> Iterator[None]:
    """Hold the lock `name` of `folder`. HeldError if another process still holds it after `timeout` seconds."""
    owner = ProcessIdentity.current()
    deadline = time.monotonic() + timeout
    while True:
        try:
            mine = _acquire(folder, name, owner)
            break
        except HeldError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
    try:
        yield
    finally:
        # If the disk is full, the mark cannot be written. The lock then ends with this process.
        with suppress(OSError):
            if mine.exists():  # the work may have removed the folder
                overwrite_json(mine, {**asdict(owner), "released": True})
