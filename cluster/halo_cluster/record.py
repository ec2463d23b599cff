"""The record of one stage: files in runs/<run>/<stage>/<input hash>/. They decide, whatever a scheduler reports.

A stage is done when its DONE.json exists. That file is published once, by hard link, after everything it names
has reached the disk. So it is valid after any crash, and two processes can never both publish it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from durable_files import ProcessIdentity, discard_leftovers, publish_once, read_json, sha256_file, write_json
from halo_cluster.attempts import (
    AttemptStatus,
    ExitReport,
    ExitState,
    attempt_folders,
    attempt_label,
    close_abandoned,
    next_label,
    release_space,
    reserve_space,
    utc_now,
)
from halo_cluster.heartbeat import Heartbeat
from halo_cluster.storage import storage_errors

DONE_FILE = "DONE.json"
CHECKPOINTS = "checkpoints"  # the folder of a stage that only unfinished attempts need
_DONE_KEYS = (
    "stage", "input_hash", "attempt", "started", "finished", "seconds", "outputs", "bytes", "summary"
)


def input_hash(content: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that change with anything in `content` (JSON values) but the order of keys."""
    canonical = json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class StageRecord:
    """One stage with one set of inputs. `folder` is runs/<run>/<stage>/<input hash>; it may not exist yet."""

    folder: Path

    @property
    def stage(self) -> str:
        return self.folder.parent.name

    @property
    def input_hash(self) -> str:
        return self.folder.name

    def done(self) -> dict[str, Any] | None:
        """DONE.json, or None before it is published.

        Checks that it belongs to this stage and these inputs, and that every output exists with its size; ValueError
        names the file that does not.
        """
        path = self.folder / DONE_FILE
        if not path.exists():
            return None
        content: dict[str, Any] = read_json(path)
        missing = [key for key in _DONE_KEYS if key not in content]
        if missing:
            raise ValueError(f"{path} lacks {missing[0]!r}; remove {self.folder} to run the stage again")
        if (content["stage"], content["input_hash"]) != (self.stage, self.input_hash):
            raise ValueError(
                f"{path} belongs to {content['stage']}/{content['input_hash']}; "
                f"move it back there, or remove {self.folder}"
            )
        for name, size in content["bytes"].items():
            if problem := _size_problem(self.folder / name, size):
                raise ValueError(f"{problem}; restore it, or remove {self.folder} to run the stage again")
        return content

    def attempts(self) -> list[AttemptStatus]:
        """Oldest first."""
        return [AttemptStatus.read(folder) for folder in attempt_folders(self.folder)]

    def attempt_folder(self, label: str) -> Path:
        return self.folder / f"attempt.{label}"

    def cleanup(self) -> None:
        """Record that attempts without an end were killed, and remove what nobody needs any more: temporary files of
        killed writers, and the checkpoints of a stage that is done. The caller knows that none of these attempts is
        alive.

        Workers of a sweep can outlive the attempt that started them. So files deeper in the stage's folder stay until
        the stage is done, when nobody needs what these workers write.
        """
        with storage_errors(self.folder):
            attempts = attempt_folders(self.folder)
            for folder in attempts:
                close_abandoned(folder)
            done = (self.folder / DONE_FILE).exists()
            if done:
                self.remove_checkpoints()
            folders = [path for path, _, _ in self.folder.walk()] if done else [self.folder, *attempts]
            for folder in folders:
                discard_leftovers(folder)

    def remove_checkpoints(self) -> None:
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)

    def begin_attempt(self, label: str | None = None) -> Attempt:
        """Start an attempt, with the next free number or with the `label` that a scheduler gave.

        The caller holds the run folder, or is the only job of its name. So other attempts without an end were killed.
        """
        self.cleanup()
        with storage_errors(self.folder):
            folder = self.attempt_folder(label or next_label(self.folder))
            folder.mkdir(parents=True)
            try:
                return Attempt(self, folder)
            except OSError:  # it has not begun; how the attempt before it ended stays the newest record
                shutil.rmtree(folder, ignore_errors=True)
                raise


class _LogFile(logging.FileHandler):
    """Drops lines that a full disk cannot hold: the stage fails by itself where it loses something."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


class Attempt:
    """One try at a stage by this process. Its folder is kept, however it ends."""

    def __init__(self, record: StageRecord, folder: Path) -> None:
        """`folder` is new and empty. Time counts from here."""
        self.record = record
        self.folder = folder
        self.log_path = folder / "log.txt"
        self.started = utc_now()
        begun = {**asdict(ProcessIdentity.current()), "command": shlex.join(sys.argv), "started": self.started}
        write_json(folder / "started.json", begun)
        reserve_space(folder)
        self._heartbeat = Heartbeat(folder / "heartbeat")

    @property
    def label(self) -> str:
        return attempt_label(self.folder)

    def log(self, text: str) -> None:
        with open(self.log_path, "a") as handle:
            handle.write(f"{utc_now()} {text.rstrip()}\n")

    @contextmanager
    def captured_logging(self) -> Iterator[None]:
        """Write what libraries log to log.txt."""
        handler = _LogFile(self.log_path, delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            with suppress(OSError):
                handler.close()

    def publish(self, outputs: Sequence[Path], summary: Mapping[str, Any]) -> dict[str, Any]:
        """Make the stage done with `outputs`, files and folders inside the stage folder.

        Returns the DONE.json that stands: another attempt's, if that one published first.
        """
        with storage_errors(self.record.folder):
            files = _output_files(self.record.folder, outputs)
            _flush(self.record.folder, files.values())
            attempts = self.record.attempts()
            content = {
                "stage": self.record.stage,
                "input_hash": self.record.input_hash,
                "attempt": self.label,
                "started": min((a.started for a in attempts if a.started), default=self.started),
                "finished": utc_now(),
                "seconds": 0.0,
                "outputs": {name: sha256_file(path) for name, path in files.items()},
                "bytes": {name: path.stat().st_size for name, path in files.items()},
                "summary": dict(summary),
            }
            earlier = sum(attempt.seconds for attempt in attempts if attempt.label != self.label)
            content["seconds"] = round(earlier + self._heartbeat.seconds, 3)
            if publish_once(self.record.folder / DONE_FILE, content):
                self.end("done")
            else:
                self.end("interrupted", "another attempt published this stage first")
            self.record.remove_checkpoints()  # not before: a kill would have cost the whole training
        published = self.record.done()
        assert published is not None
        return published

    def fail(self, reason: str) -> None:
        """End with a fault of this host."""
        self.end("failed", reason, host=socket.gethostname())

    def end(self, state: ExitState, reason: str = "", *, host: str = "", final: bool = False) -> None:
        """Record how the attempt ended; ExitReport says what `host` and `final` mean."""
        self._heartbeat.stop()
        report = ExitReport(state, reason, host, final, round(self._heartbeat.seconds, 3))
        # A full disk must not hide the failure being recorded; this attempt is then counted by its heartbeat.
        with suppress(OSError):
            release_space(self.folder)
            report.publish(self.folder / "exit.json")


def _size_problem(path: Path, size: int) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    found = path.stat().st_size
    return None if found == size else f"{path} has {found} bytes instead of {size}"


def _output_files(stage_folder: Path, outputs: Sequence[Path]) -> dict[str, Path]:
    """Every file of `outputs`, folders opened up, by its path inside the stage folder."""
    files: dict[str, Path] = {}
    for output in outputs:
        if not output.is_relative_to(stage_folder):
            raise RuntimeError(f"output {output} is not in its stage's folder {stage_folder}")
        found = (
            [path for path in sorted(output.rglob("*")) if path.is_file()] if output.is_dir() else [output]
        )
        if not found or not found[0].is_file():
            raise RuntimeError(f"the stage did not write its output {output}")
        files |= {str(path.relative_to(stage_folder)): path for path in found}
    return files


def _flush(stage_folder: Path, files: Iterable[Path]) -> None:
    """Flush files to the disk, and the listing of every folder on the path from the runs folder to them.

    Other files in the stage folder are left alone: another attempt may be writing and removing them.
    """
    named = set(files)
    listings = {stage_folder, *stage_folder.parents[:3]}
    listings |= {folder for path in named for folder in path.parents if folder.is_relative_to(stage_folder)}
    for path in sorted(named | listings):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
