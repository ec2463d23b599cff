"""Folders of large files that threads and nodes write. A job can be resumed; its folder appears when it is complete.

While a job is running, everything is in OUT.unfinished/:

    job.json            what is made from what; a rerun resumes only if it asks for the same
    files/              the future folder; it is renamed to OUT at the end
    sums/<file>.json    size and SHA-256 of a finished file
    part-<n>.lock.<i>   held by the process that writes this part (see durable_files/lock.py)

A file is finished when its sum exists and still matches. Anything else that a killed process left is written again. The
processes of several nodes divide the files by part number, without communicating. The one that finishes last publishes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch

from durable_files import exclusive, publish_folder, publish_once, read_json, sha256_file, write_json
from sharded_tensors.index import Sums
from sharded_tensors.writer import Advance, TensorFile, write_files

UNFINISHED, JOB_FILE = ".unfinished", "job.json"
LOCK_TIMEOUT_SECONDS = 15.0  # a killed process may take moments to end
_SPARE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class JobPart:
    """Part `index` of `count` of a job: the files index, index + count, ..."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class FolderJob:
    """What has to be written as folder `out`.

    `identity` (plain JSON, no tuples) is everything that the result depends on; a rerun with an equal one resumes.
    `finish` adds the small files to the folder that it is given, and gets size and SHA-256 of every tensor file.
    """

    out: Path
    identity: Mapping[str, Any]
    tensor_files: Sequence[TensorFile]
    finish: Callable[[Path, Sums], None]

    @property
    def unfinished(self) -> Path:
        return self.out.with_name(self.out.name + UNFINISHED)

    @property
    def files_folder(self) -> Path:
        return self.unfinished / "files"

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.tensor_files)

    def published(self) -> bool:
        """Whether `out` is the result of this job, which was killed between the rename and the cleanup."""
        if not (self.out.exists() and self.unfinished.exists()) or self.files_folder.exists():
            return False
        return self._is_ours() or not any(self.unfinished.iterdir())

    def _is_ours(self) -> bool:
        path = self.unfinished / JOB_FILE
        return path.is_file() and read_json(path) == self.identity

    def require_free(self, part: JobPart = JobPart()) -> None:
        """ValueError unless `out` is free, or this same job was begun there."""
        if self.published():
            return
        if self.out.exists():
            raise ValueError(f"{self.out} exists already; remove it or choose another name")
        path = self.unfinished / JOB_FILE
        if path.is_file() and not self._is_ours():
            asked, begun = self.identity, read_json(path)
            changed = sorted(key for key in {*asked, *begun} if asked.get(key) != begun.get(key))
            raise ValueError(
                f"{self.unfinished} was begun by another job (it differs in: {', '.join(changed)}); remove it, give "
                "the same arguments as before, or choose another name"
            )
        if len(self.tensor_files) < part.count:
            raise ValueError(
                f"{self.out} consists of {len(self.tensor_files)} files, too few for {part.count} parts; give fewer "
                "parts or a smaller file size"
            )

    def begin(self, part: JobPart = JobPart()) -> None:
        self.require_free(part)
        for path in (self.files_folder, self.unfinished / "sums"):
            path.mkdir(parents=True, exist_ok=True)
        publish_once(self.unfinished / JOB_FILE, self.identity)
        self.require_free(part)  # two different jobs may have begun at the same moment

    def sums(self) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of the finished files, as recorded."""
        recorded = {file.name: _recorded_sum(self.unfinished, file) for file in self.tensor_files}
        return {name: sums for name, sums in recorded.items() if sums}


def require_no_job(folder: Path) -> None:
    """ValueError if `folder` belongs to a job that is running or was killed: there is no complete model in it."""
    for path in (folder.absolute(), folder.absolute().parent):
        if path.name.endswith(UNFINISHED) and (path / JOB_FILE).is_file():
            raise ValueError(
                f"{folder} is the work of a command that has not ended; repeat that command, and use "
                f"{path.with_name(path.name.removesuffix(UNFINISHED))}"
            )


def _sum_file(unfinished: Path, file: TensorFile) -> Path:
    return unfinished / "sums" / f"{file.name}.json"


def _recorded_sum(unfinished: Path, file: TensorFile) -> tuple[int, str] | None:
    """Size and SHA-256 of a finished file, as recorded. A file of another size is not finished."""
    path, written = _sum_file(unfinished, file), unfinished / "files" / file.name
    if not (path.is_file() and written.is_file()):
        return None
    entry = read_json(path)
    return (entry["bytes"], entry["sha256"]) if written.stat().st_size == entry["bytes"] else None


def keep_or_write(unfinished: Path, file: TensorFile, advance: Advance) -> None:
    """Keep a file whose recorded sum still matches; otherwise write it (again)."""
    folder, sum_file = unfinished / "files", _sum_file(unfinished, file)
    recorded = _recorded_sum(unfinished, file)
    if recorded and sha256_file(folder / file.name) == recorded[1]:
        advance(file.nbytes)
        return
    sum_file.unlink(missing_ok=True)
    size, digest = file.write(folder, advance)
    write_json(sum_file, {"bytes": size, "sha256": digest})


def _write_in_threads(unfinished: Path, files: Sequence[TensorFile], threads: int, advance: Advance) -> None:
    """Write every file, `threads` at a time. At the first error, or Ctrl-C, all stop and it is raised.

    Hashing, copying and writing release Python's lock, so threads are as fast as processes would be.
    """
    stop = Event()

    def advance_or_stop(count: int) -> None:
        if stop.is_set():
            raise CancelledError
        advance(count)

    threads_per_operation = torch.get_num_threads()
    torch.set_num_threads(1)  # in the threads that start now
    pool = ThreadPoolExecutor(threads)
    try:
        for done in as_completed([pool.submit(keep_or_write, unfinished, f, advance_or_stop) for f in files]):
            done.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads_per_operation)


def run_job(
    job: FolderJob, *, workers: int = 1, part: JobPart = JobPart(), advance: Advance = lambda count: None
) -> bool:
    """Do, or resume, one part of a job. True when `job.out` is complete, False while other parts are missing.

    Raises ValueError when `out` is not free, another process writes this part, or the disk is too full; OSError when
    writing fails. Finished files are kept in all these cases, and the same call resumes.
    """
    if job.published():
        advance(job.nbytes)
        _drop_unfinished(job)
        return True
    if part.index and job.out.exists() and not job.unfinished.exists():
        return True  # another part finished last and published
    job.begin(part)
    with exclusive(job.unfinished, f"part-{part.index}.lock", timeout=LOCK_TIMEOUT_SECONDS):
        mine = job.tensor_files[part.index :: part.count]
        _require_space(job, mine)
        _write_in_threads(job.unfinished, mine, workers, advance)
        try:
            return _publish_if_complete(job)
        except FileNotFoundError:  # another part published, and removed the folder while this one waited
            if job.unfinished.exists() or not job.out.exists():
                raise
            return True


def run_from_scratch(job: FolderJob) -> None:
    """Do an entire job in this process. Nothing is left if it fails; an existing `out` is replaced.

    This is for stages, which are repeated as a whole.
    """
    shutil.rmtree(job.unfinished, ignore_errors=True)
    try:
        job.files_folder.mkdir(parents=True)
        job.finish(job.files_folder, write_files(job.files_folder, job.tensor_files)[1])
        publish_folder(job.files_folder, job.out)
    finally:
        shutil.rmtree(job.unfinished, ignore_errors=True)


def _require_space(job: FolderJob, files: Sequence[TensorFile]) -> None:
    done = job.sums()
    needed = sum(file.nbytes for file in files if file.name not in done)
    free = shutil.disk_usage(job.unfinished).free
    if needed and needed + _SPARE_BYTES > free:
        raise ValueError(
            f"{job.out} needs {needed / 1e9:.2f} GB more but its disk has {free / 1e9:.2f} GB free; free some space, "
            "then repeat the command"
        )


def _publish_if_complete(job: FolderJob) -> bool:
    with exclusive(job.unfinished, "publish.lock", timeout=LOCK_TIMEOUT_SECONDS):
        if job.files_folder.exists():  # otherwise a part that finished at the same moment has published it
            sums = job.sums()
            if len(sums) < len(job.tensor_files):
                return False
            for path in job.files_folder.iterdir():  # what killed writers left under temporary names
                if path.name not in sums:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            job.finish(job.files_folder, sums)
            publish_folder(job.files_folder, job.out)
    _drop_unfinished(job)
    return True


def _drop_unfinished(job: FolderJob) -> None:
    """Remove OUT.unfinished, job.json last, so that after a kill in between the next call knows it as published."""
    record = job.unfinished / JOB_FILE
    for path in [*job.unfinished.glob("*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path != record:
            path.unlink(missing_ok=True)
    record.unlink(missing_ok=True)
    with suppress(OSError):  # another part was faster, or has just released its lock in there
        job.unfinished.rmdir()
