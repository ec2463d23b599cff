"""What the reconciler and a scheduler exchange: a stage to run as a job, and the state of jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

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


class Scheduler(Protocol):
    """A batch system. Every method is one call to it, however many jobs there are."""

    def live(self) -> dict[str, list[LiveJob]]:
        """This user's jobs by name, oldest first. SchedulerUnreachable if the scheduler does not answer."""

    def ended(self, jobs: Iterable[str]) -> dict[str, EndedJob]:
        """What is known of jobs that have left the queue; some may be missing for a while."""

    def submit(self, job: StageJob, *, after: Sequence[str] = (), exclude: Sequence[str] = ()) -> str:
        """Run `job` once the jobs `after` have succeeded, on none of the nodes `exclude`; returns the job's id."""

    def cancel(self, jobs: Sequence[str]) -> None:
        """Cancel jobs; those that have ended are ignored."""

    def start_now(self, jobs: Sequence[str]) -> None:
        """End the waiting time of requeued jobs."""

    def release(self, jobs: Sequence[str]) -> None:
        """Release jobs that the scheduler holds because it could not start them."""


class SchedulerUnreachable(RuntimeError):
    """The scheduler did not answer; jobs may be running nevertheless."""


class SubmissionRefused(ValueError):
    """The scheduler rejected a job; the message is its own."""
