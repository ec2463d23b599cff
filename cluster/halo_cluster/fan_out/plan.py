"""The tasks of a fan-out and the function that does them, as JSON that any worker can read."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from durable_files import publish_once, read_json
from halo_cluster.record import input_hash

WorkerFunction = Callable[[Any], Any]
"""Maps a task's arguments to its result. Setup, arguments and results are JSON values."""

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def import_function(path: str) -> Any:
    """The function that "module:function" names."""
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)


@dataclass(frozen=True)
class Task:
    """`name` becomes a file name: letters, digits, `.`, `_`, `-`."""

    name: str
    arguments: Any


@dataclass(frozen=True)
class Plan:
    """Tasks in the order in which workers take them. With the longest first, workers wait least at the end.

    A task that raises an exception is retried `retries` times.
    """

    worker: str
    setup: Any
    tasks: tuple[Task, ...]
    retries: int = 2

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        assert len(set(names)) == len(names), "two tasks have the same name"
        for name in names:
            assert _TASK_NAME.fullmatch(name), f"{name!r} cannot be a file name"

    @property
    def digest(self) -> str:
        return input_hash(asdict(self))

    def save(self, folder: Path) -> Path:
        """Save the plan in `folder` under its digest; returns the path."""
        path = folder / "plans" / f"{self.digest}.json"
        publish_once(path, asdict(self))
        return path

    @classmethod
    def read(cls, path: Path) -> Plan:
        content = read_json(path)
        return cls(**{**content, "tasks": tuple(Task(**task) for task in content["tasks"])})

    def make_worker(self) -> WorkerFunction:
        """Import the function that `worker` names, and let it load what it needs."""
        function: WorkerFunction = import_function(self.worker)(self.setup)
        return function
