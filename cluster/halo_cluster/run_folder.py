"""runs/<name>: the latest recipe and plan of a run, and the records of its stages.

recipe.yaml    the recipe of the latest `halo run`; every attempt keeps its own
plan.json      its stages in running order, each with its input hash
<stage>/<input hash>/INPUTS.json    what the hash is made of

A run is a cache: every stage folder is named by a hash of what its result depends on. A changed recipe refers to other
stage folders where its results differ, and to the same ones elsewhere. Folders that the plan does not name stay until
`halo gc` removes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from durable_files import exclusive, read_json, refuse_while_held, write_json, write_text
from halo_cluster.attempts import AttemptState, AttemptStatus
from halo_cluster.record import DONE_FILE, StageRecord
from halo_cluster.storage import storage_errors

RECIPE_FILE = "recipe.yaml"
PLAN_FILE = "plan.json"
INPUTS_FILE = "INPUTS.json"
_INPUT_HASH = re.compile(r"[0-9a-f]{12}")


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
    def opened(self) -> Iterator[None]:
        """Hold the run for this process.

        ValueError if a live process holds it; StorageError if it cannot be written.
        """
        with ExitStack() as held:
            with storage_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(exclusive(self.folder))
            yield

    def prepare(self) -> None:
        """Make the folder without holding it: the jobs of a scheduler exclude each other by their names.

        ValueError if a live process holds it; StorageError if it cannot be written.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_while_held(self.folder)

    def write_plan(self, recipe_yaml: str, input_hashes: Mapping[str, str]) -> None:
        """Make `recipe_yaml` the run's recipe, with `input_hashes` by stage name in running order."""
        with storage_errors(self.folder):
            write_json(self.folder / PLAN_FILE, dict(input_hashes))
            write_text(self.folder / RECIPE_FILE, recipe_yaml)

    def planned(self) -> list[StageRecord]:
        """Records of the stages of the latest recipe, in running order; empty before the first `write_plan`."""
        path = self.folder / PLAN_FILE
        hashes: dict[str, str] = read_json(path) if path.exists() else {}
        return [self.stage(name, input_hash) for name, input_hash in hashes.items()]

    def stage(self, name: str, input_hash: str) -> StageRecord:
        return StageRecord(self.folder / name / input_hash)

    def records(self) -> list[StageRecord]:
        """Every stage folder here, of the latest recipe and of earlier ones."""
        folders = sorted(self.folder.glob("*/*"))
        return [StageRecord(folder) for folder in folders if _INPUT_HASH.fullmatch(folder.name)]

    def status(self) -> list[StageStatus]:
        """Every stage that was ever begun here, in the order in which they were."""
        rows = []
        for record in self.records():
            if attempts := record.attempts():
                is_done = (record.folder / DONE_FILE).exists()
                rows.append(StageStatus(record, "done" if is_done else attempts[-1].state, tuple(attempts)))
        return sorted(rows, key=lambda row: (row.attempts[0].started, row.record.stage))
