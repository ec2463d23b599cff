"""What the reconciler and a scheduler speak of: a stage to be run as a job, and what the scheduler knows of jobs."""

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
    """A stage as a job. `work` (JSON) is what its process on the first node reads to know what to do."""

    name: str
    record: StageRecord
    work: Mapping[str, Any]
    processes: int = 1
    """Over all nodes; 1 for stages that do not train, which get one node."""
    depends_on: tuple[str, ...] = ()
    """Names of stages, as in `name`."""

    @property
    def job_name(self) -> str:
        """The same whoever submits it, and another one for another user's run of the same name."""
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
    """A job that the scheduler has in its queue. `reason` says why it waits, `nodes` where it runs."""

    job: str
    name: str
    state: LiveState
    reason: str
    nodes: str


@dataclass(frozen=True)
class EndedJob:
    """A job that has left the queue: the scheduler's word for its end (COMPLETED, FAILED, CANCELLED, ...)."""

    job: str
    state: str
    nodes: str


class Scheduler(Protocol):
    """A batch system. Every method is one call to it, however many jobs there are."""

    def live(self) -> dict[str, list[LiveJob]]:
        """This user's jobs by name, oldest first. SchedulerUnreachable if it does not answer."""

    def ended(self, jobs: Iterable[str]) -> dict[str, EndedJob]:
        """What is known of jobs that are not in the queue any more; some may be missing for a while."""

    def submit(self, job: StageJob, *, after: Sequence[str] = (), exclude: Sequence[str] = ()) -> str:
        """Have `job` run once the jobs `after` have succeeded, on none of the nodes `exclude`; returns the job's id."""

    def cancel(self, jobs: Sequence[str]) -> None:
        """End jobs; those already ended are left alone."""

    def start_now(self, jobs: Sequence[str]) -> None:
        """Lift the waiting time of jobs that were put back into the queue."""

    def release(self, jobs: Sequence[str]) -> None:
        """Let jobs begin that the scheduler holds since it could not begin them."""


class SchedulerUnreachable(RuntimeError):
    """The scheduler did not answer; jobs may be running all the same."""


class SubmissionRefused(ValueError):
    """The scheduler will not take a job as it is; the message is its own."""
