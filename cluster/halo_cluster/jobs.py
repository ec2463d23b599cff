"""What the reconciler and Slurm exchange: a stage to run as a job, and the state of jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from halo_cluster.record import StageRecord

LiveState = Literal["pending", "running", "ending"]


@dataclass(frozen=True)
class StageJob:
    """A stage as a job. Its process on the first node reads `work` (JSON) to know what to do."""

    name: str
    record: StageRecord
    work: Mapping[str, Any]
    processes: int = 1
    """Over all nodes; 1 for stages that do not train, which get one node."""
    depends_on: tuple[str, ...] = ()
    """Names of stages, as in `name`."""

    @property
    def job_name(self) -> str:
        """The same whoever submits it. Runs of the same name in other folders get other job names."""
        run = self.record.folder.parent.parent.resolve()
        return (
            f"halo.{hashlib.sha256(str(run).encode()).hexdigest()[:8]}.{self.name}.{self.record.input_hash}"
        )

    @property
    def jobs_folder(self) -> Path:
        """The scheduler's own files: scripts, stdout, stderr, and a note per submission."""
        return self.record.folder / "jobs"


@dataclass(frozen=True)
class LiveJob:
    """A job in the scheduler's queue. `reason` says why it waits, `nodes` where it runs."""

    job: str
    name: str
    state: LiveState
    reason: str
    nodes: str


@dataclass(frozen=True)
class EndedJob:
    """A job that has left the queue, with the scheduler's final state (COMPLETED, FAILED, CANCELLED, ...)."""

    job: str
    state: str
    nodes: str


class SchedulerUnreachable(RuntimeError):
    """The scheduler did not answer; jobs may be running nevertheless."""


class SubmissionRefused(ValueError):
    """The scheduler rejected a job; the message is its own."""
