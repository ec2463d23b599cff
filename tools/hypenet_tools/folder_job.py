"""Folders of large files, written by several processes, resumable, and visible only when complete.

While a job is at work everything is in OUT.unfinished/:

    job.json            what is made of what; a rerun resumes if it asks for the same
    files/              the folder to be; it is renamed to OUT at the end
    sums/<file>.json    size and SHA-256 of a file that is finished
    part-<n>.lock       held by the process that writes this part

A file is finished when its sum is there and still true of it; whatever a kill left otherwise is written again.
The processes of several nodes share the work by part numbers, without talking to each other: whoever finishes
last publishes.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from durable_files import (
    publish_folder,
    publish_once,
    read_json,
    sha256_file,
    write_json,
)
from hypenet_tools.workers import run_in_workers
from sharded_tensors.writer import Advance, Shard

UNFINISHED, JOB_FILE = ".unfinished", "job.json"
LOCK_PATIENCE_SECONDS = 15.0
_SPARE_BYTES = 16 * 2**20

Sums = Mapping[str, tuple[int, str]]


@dataclass(frozen=True)
class Part:
    """Part `index` of `count` of a job: the files index, index + count, ..."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Job:
    """What is to appear as `out`.

    `identity` (JSON) is everything that the result depends on: a rerun with an equal one resumes. `finish` adds the
    small files to the folder that it is given; it gets size and SHA-256 of every shard.
    """

    out: Path
    identity: Mapping[str, Any]
    shards: Sequence[Shard]
    finish: Callable[[Path, Sums], None]

    @property
    def unfinished(self) -> Path:
        return self.out.with_name(self.out.name + UNFINISHED)

    @property
    def files(self) -> Path:
        return self.unfinished / "files"

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def published(self) -> bool:
        """Whether `out` is there as the result of this job, whose end was cut short after the rename."""
        if not (self.out.exists() and self.unfinished.exists()) or self.files.exists():
            return False
        return self._is_ours() or not any(self.unfinished.iterdir())

    def _is_ours(self) -> bool:
        path = self.unfinished / JOB_FILE
        return path.is_file() and read_json(path) == self.plain_identity()

    def plain_identity(self) -> Any:
        return json.loads(json.dumps(self.identity))

    def require_free(self, part: Part = Part()) -> None:
        """ValueError unless `out` is free, or this very job was begun there."""
        if self.published():
            return
        if self.out.exists():
            raise ValueError(f"{self.out} exists already; remove it or choose another name")
        path = self.unfinished / JOB_FILE
        if path.is_file() and not self._is_ours():
            asked, begun = self.plain_identity(), read_json(path)
            changed = sorted(key for key in {*asked, *begun} if asked.get(key) != begun.get(key))
            raise ValueError(
                f"{self.unfinished} was begun by another job (it differs in: {', '.join(changed)}); remove it, give "
                "the same arguments as then, or choose another name"
            )
        if len(self.shards) < part.count:
            raise ValueError(
                f"{self.out} is made of {len(self.shards)} files, too few for {part.count} parts; give fewer parts "
                "or a smaller file size"
            )

    def begin(self, part: Part = Part()) -> None:
        self.require_free(part)
        for path in (self.files, self.unfinished / "sums"):
            path.mkdir(parents=True, exist_ok=True)
        publish_once(self.unfinished / JOB_FILE, self.plain_identity())
        self.require_free(part)  # two different jobs may have begun at the same moment

    def sums(self) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of the shards that are finished, as recorded."""
        found = {}
        for shard in self.shards:
            path = _sum_file(self.unfinished, shard)
            if path.is_file():
                entry = read_json(path)
                found[shard.name] = (int(entry["bytes"]), str(entry["sha256"]))
        return found


def require_no_job(folder: Path) -> None:
    """ValueError if `folder` is where a job is at work, or was when it was killed: what lies there is no model yet."""
    for path in (folder.absolute(), folder.absolute().parent):
        if path.name.endswith(UNFINISHED) and (path / JOB_FILE).is_file():
            raise ValueError(
                f"{folder} is the work of a command that has not ended; repeat that command, and use "
                f"{path.with_name(path.name.removesuffix(UNFINISHED))}"
            )


def _sum_file(unfinished: Path, shard: Shard) -> Path:
    return unfinished / "sums" / f"{shard.name}.json"


def keep_or_write(unfinished: Path, shard: Shard, advance: Advance) -> None:
    """One file: kept if its sum is there and true, otherwise written (again)."""
    files, sum_file = unfinished / "files", _sum_file(unfinished, shard)
    path = files / shard.name
    if sum_file.is_file() and path.is_file():
        entry = read_json(sum_file)
        if path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]:
            advance(shard.nbytes)
            return
        sum_file.unlink()
    size, digest = shard.write(files, advance)
    write_json(sum_file, {"bytes": size, "sha256": digest})


def run_job(
    job: Job, *, workers: int = 1, part: Part = Part(), advance: Advance = lambda count: None
) -> bool:
    """Do (or finish) a part of a job; True when `job.out` is complete, False while other parts are missing.

    Raises ValueError when `out` is not free or too little disk is, OSError when writing fails; what was finished is
    kept in both cases, and the same call goes on.
    """
    if job.published():
        advance(job.nbytes)
        _drop_unfinished(job)
        return True
    if part.index and job.out.exists() and not job.unfinished.exists():
        return True  # the last part to be written was another one
    job.begin(part)
    with _locked(job.unfinished / f"part-{part.index}.lock", job.unfinished):
        mine = job.shards[part.index :: part.count]
        _require_room(job, mine)
        run_in_workers(partial(keep_or_write, job.unfinished), mine, workers, advance)
        return _publish_if_complete(job)


def run_afresh(job: Job) -> None:
    """Do a job from the beginning, in this process; nothing is left of it if it fails, and an `out` is replaced.

    For stages and tests, which begin again by themselves.
    """
    shutil.rmtree(job.unfinished, ignore_errors=True)
    try:
        job.files.mkdir(parents=True)
        sums = {shard.name: shard.write(job.files, lambda count: None) for shard in job.shards}
        job.finish(job.files, sums)
        publish_folder(job.files, job.out)
    finally:
        shutil.rmtree(job.unfinished, ignore_errors=True)


def _require_room(job: Job, shards: Sequence[Shard]) -> None:
    done = job.sums()
    needed = sum(shard.nbytes for shard in shards if shard.name not in done)
    free = shutil.disk_usage(job.unfinished).free
    if needed and needed + _SPARE_BYTES > free:
        raise ValueError(
            f"{job.out} needs {needed / 1e9:.2f} GB more but its disk has {free / 1e9:.2f} GB free; make room, then "
            "repeat the command"
        )


@contextmanager
def _locked(path: Path, about: Path) -> Iterator[None]:
    """Hold a lock file. The workers of a killed process die within moments; until then it is theirs."""
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    with open(path, "a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{about} is being written by another process; wait for it, or end it"
                    ) from None
                time.sleep(0.1)
        yield


def _publish_if_complete(job: Job) -> bool:
    with _locked(job.unfinished / "publish.lock", job.unfinished):
        if job.published():  # by a part that finished at the same moment
            return True
        sums = job.sums()
        if len(sums) < len(job.shards):
            return False
        for path in job.files.iterdir():  # what killed writers left under temporary names
            if path.name not in sums:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        job.finish(job.files, sums)
        publish_folder(job.files, job.out)
    _drop_unfinished(job)
    return True


def _drop_unfinished(job: Job) -> None:
    """job.json goes last: a kill in between leaves something that the next call knows as published."""
    record = job.unfinished / JOB_FILE
    for path in [*job.unfinished.glob("*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path != record:
            path.unlink(missing_ok=True)
    record.unlink(missing_ok=True)
    with suppress(FileNotFoundError):  # another part was faster
        job.unfinished.rmdir()
