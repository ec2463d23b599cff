"""What is to be done: the tasks, and the function that does them, as JSON that any worker can read."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from durable_files import publish_once, read_json
from halo_cluster.record import input_hash

Worker = Callable[[Any], Any]
MakeWorker = Callable[[Any], Worker]
"""`make_worker(setup)` returns a function of a task's arguments; setup, arguments and results are JSON values."""

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Task:
    """`name` becomes a file name: letters, digits, `.`, `_`, `-`."""

    name: str
    arguments: Any


@dataclass(frozen=True)
class Plan:
    """Tasks in the order in which they are handed out; the longest first leaves the least waiting at the end.

    A task that ends in an exception is tried again `retries` times.
    """

    worker: str
    setup: Any
    tasks: tuple[Task, ...]
    retries: int = 2

    def __post_init__(self) -> None:
        assert _IMPORT_PATH.fullmatch(self.worker), f"{self.worker!r} is not module:function"
        names = [task.name for task in self.tasks]
        assert len(set(names)) == len(names), "two tasks have the same name"
        for name in names:
            assert _TASK_NAME.fullmatch(name), f"{name!r} cannot be a file's name"

    @property
    def digest(self) -> str:
        return input_hash(asdict(self))

    def save(self, folder: Path) -> Path:
        """Put the plan into `folder` under a name that no other plan has."""
        path = folder / "plans" / f"{self.digest}.json"
        if not path.exists():
            publish_once(path, asdict(self))
        return path

    @classmethod
    def read(cls, path: Path) -> Plan:
        content = read_json(path)
        tasks = tuple(Task(task["name"], task["arguments"]) for task in content["tasks"])
        return cls(content["worker"], content["setup"], tasks, content["retries"])

    def make_worker(self) -> Worker:
        """Import the worker function and let it load what it needs."""
        module, _, function = self.worker.partition(":")
        make: MakeWorker = getattr(importlib.import_module(module), function)
        return make(self.setup)
