"""One driver at a time per run folder, by files alone: no flock, which network file systems handle unevenly.

The holder is the process named in the lock file with the highest number, until it marks the file released or
ends. Whoever finds that holder gone publishes the next number; the hard link lets only one do so. The highest
number is never removed before a higher one exists, so a slow rival that publishes an old number sees a higher
one and steps back. Stage results do not rest on this lock (DONE.json is published once); it spares the work and
the checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from durable_files import publish_once, read_json, write_json
from halo_cluster.processes import ProcessIdentity

_LOCK_NAME = re.compile(r"lock\.(\d+)")


def _locks(folder: Path) -> dict[int, Path]:
    matches = ((_LOCK_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def _refuse_while_held(folder: Path, lock: Path) -> None:
    content = read_json(lock)
    owner = ProcessIdentity.from_json(content)
    if content["released"] or owner.has_ended():
        return
    if owner.is_on_this_host:
        raise ValueError(
            f"{folder} is in use by process {owner.pid}; wait for it, stop it, or choose another --run name"
        )
    raise ValueError(
        f"{folder} is in use by process {owner.pid} on {owner.host}; "
        f"wait for it, or remove {lock} if it has ended"
    )


def _acquire(folder: Path, owner: ProcessIdentity) -> Path:
    while True:
        newest, newest_path = max(_locks(folder).items(), default=(0, None))
        if newest_path is not None:
            try:
                _refuse_while_held(folder, newest_path)
            except ValueError:
                if newest_path.exists():
                    raise
                continue  # its successor removed it while we read
        number, mine = newest + 1, folder / f"lock.{newest + 1}"
        if not publish_once(mine, {**asdict(owner), "released": False}):
            continue
        locks = _locks(folder)
        if max(locks) > number:
            mine.unlink(missing_ok=True)
            continue
        for other, path in locks.items():
            if other < number:
                path.unlink(missing_ok=True)
        return mine


def refuse_while_held(folder: Path) -> None:
    """ValueError names the live process that holds `folder`, if one does."""
    locks = _locks(folder)
    if locks:
        with suppress(FileNotFoundError):  # its successor removed it while we read
            _refuse_while_held(folder, locks[max(locks)])


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder`; ValueError names the process that does already."""
    owner = ProcessIdentity.current()
    mine = _acquire(folder, owner)
    try:
        yield
    finally:
        # On a full disk the mark cannot be written; the lock then ends with this process.
        with suppress(OSError):
            write_json(mine, {**asdict(owner), "released": True})
