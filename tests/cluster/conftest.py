"""A run folder and stages that count how often they ran."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from halo_cluster import Attempt, PlannedStage, RunFolder, StageRecord, StageResult, input_hash

RECIPE = "name: small\nseed: 1\nalign:\n  steps: 100\n  context_length: 512\n"


@pytest.fixture
def recipe() -> str:
    return RECIPE


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "small")


@pytest.fixture
def record(run: RunFolder) -> StageRecord:
    return run.stage("distill.uniform", input_hash({"steps": 3}))


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


class CountingStage:
    """Writes how often it ran into result.txt; raises `error` instead when given one."""

    def __init__(self, record: StageRecord, error: BaseException | None = None) -> None:
        self.record = record
        self.error = error
        self.runs = 0

    def __call__(self, attempt: Attempt) -> StageResult:
        self.runs += 1
        if self.error is not None:
            raise self.error
        result = self.record.folder / "result.txt"
        result.write_text(str(self.runs))
        return StageResult([result], {"runs": self.runs})

    def planned(self, *depends_on: str) -> PlannedStage:
        return PlannedStage(self.record.stage, self.record, self, depends_on)


@pytest.fixture
def counting() -> type[CountingStage]:
    return CountingStage
