"""runs/<name>: one recipe, frozen, and the records of its stages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from durable_files import publish_text_once
from halo_cluster.attempts import AttemptState, AttemptStatus
from halo_cluster.lock import exclusive, refuse_while_held
from halo_cluster.record import DONE_FILE, StageRecord
from halo_cluster.storage import storage_errors

RECIPE_FILE = "recipe.yaml"
_INPUT_HASH = re.compile(r"[0-9a-f]{12}")
_SHOWN_DIFFERENCES = 3


@dataclass(frozen=True)
class StageStatus:
    """A row of the status table. `seconds` is wall time over all attempts; `reason` is the last failure's."""

    record: StageRecord
    state: AttemptState
    attempts: tuple[AttemptStatus, ...]

    @property
    def seconds(self) -> float:
        return sum(attempt.seconds for attempt in self.attempts)

    @property
    def reason(self) -> str:
        return self.attempts[-1].reason if self.attempts else ""


class RunFolder:
    """A run. Making this object touches nothing: looking at a run needs no lock and no right to write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def opened(self, recipe_yaml: str) -> Iterator[None]:
        """Hold the run for this process, with `recipe_yaml` as its recipe.

        ValueError if a live process holds it or it has another recipe; StorageError if it cannot be written.
        """
        with ExitStack() as held:
            with storage_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(exclusive(self.folder))
                self._freeze(recipe_yaml)
            yield

    def prepare(self, recipe_yaml: str) -> None:
        """Freeze `recipe_yaml`, without holding the run: jobs of a scheduler exclude each other by their names.

        ValueError if it has another recipe, or if a live process holds it; StorageError if it cannot be written.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_while_held(self.folder)
            self._freeze(recipe_yaml)

    def _freeze(self, recipe_yaml: str) -> None:
        path = self.folder / RECIPE_FILE
        if not path.exists() and publish_text_once(path, recipe_yaml):
            return
        try:
            frozen = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            raise ValueError(
                f"{path} is damaged; choose another --run name, or remove {self.folder}"
            ) from None
        differences = list(_differences(frozen, yaml.safe_load(recipe_yaml)))
        if differences:
            more = len(differences) - _SHOWN_DIFFERENCES
            shown = ", ".join(differences[:_SHOWN_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")
            raise ValueError(
                f"{self.folder} holds a run of another recipe: {shown}; "
                f"choose another --run name, or remove {self.folder}"
            )

    def stage(self, name: str, input_hash: str) -> StageRecord:
        return StageRecord(self.folder / name / input_hash)

    def status(self) -> list[StageStatus]:
        """Every stage that was ever begun here, in the order in which they were."""
        rows = []
        for folder in self.folder.glob("*/*"):
            record = StageRecord(folder)
            attempts = record.attempts() if _INPUT_HASH.fullmatch(folder.name) else []
            if attempts:
                is_done = (folder / DONE_FILE).exists()
                rows.append(StageStatus(record, "done" if is_done else attempts[-1].state, tuple(attempts)))
        return sorted(rows, key=lambda row: (row.attempts[0].started, row.record.stage))


def _differences(frozen: Any, given: Any, key: str = "") -> Iterator[str]:
    """One phrase per leaf of two parsed recipes that is not the same in both."""
    if isinstance(frozen, dict) and isinstance(given, dict):
        for name in [*frozen, *(name for name in given if name not in frozen)]:
            inner = f"{key}.{name}" if key else str(name)
            yield from _differences(frozen.get(name, _ABSENT), given.get(name, _ABSENT), inner)
    elif frozen != given:
        yield f"{key or 'recipe'} is {_shown(frozen)} there and {_shown(given)} now"


_ABSENT = object()


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
