"""Brings stages to DONE as jobs of Slurm: looks at the current state and takes the next step.

The state is kept elsewhere: DONE.json says what is done, and the scheduler's queue says what runs, under a job name
derived from the stage. So the reconciler can be killed at any time, run twice at once, or never run again. Jobs
continue without it. Two jobs of one name run one after the other (dependency singleton), and the second finds the stage
done.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from halo_cluster.attempts import KILLED, AttemptStatus, attempt_folders, close_abandoned
from halo_cluster.execution import StageFailed, StopRequested
from halo_cluster.jobs import LiveJob, SchedulerUnreachable, StageJob, SubmissionRefused
from halo_cluster.slurm.submit import Slurm
from halo_cluster.storage import storage_errors

POLL_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 600.0
# A network file system may show a new file some seconds late. A job that has left the queue is judged after this time.
_VISIBILITY_SECONDS = 5.0
# A requeued job may take this long to end on its node (KillWait of slurm.conf). Started there before that, Slurm sees
# it twice, holds it, and takes the node out of service.
_KILL_WAIT_SECONDS = 30.0
_WAITS, _HELD = "BeginTime", "launch failed requeued held"
_STYLES = {"done": "green", "running": "cyan", "pending": "cyan", "ending": "cyan", "again": "yellow"}


@dataclass(frozen=True)
class RetryPolicy:
    """For stages that fail: how often each is retried, after how long (doubling up to MAX_BACKOFF_SECONDS), and after
    how many failures a node is avoided."""

    retries: int = 3
    backoff_seconds: float = 15.0
    failures_per_node: int = 2


class Reconciler:
    """`step` makes one pass over `jobs`, which are in running order; `run` repeats it to the end."""

    def __init__(
        self,
        jobs: Sequence[StageJob],
        scheduler: Slurm,
        console: Console,
        policy: RetryPolicy | None = None,
    ) -> None:
        self.jobs = jobs
        self.scheduler = scheduler
        self.policy = policy or RetryPolicy()
        self.published: dict[str, dict[str, Any]] = {}
        self._console = console
        self._width = max((len(job.name) for job in jobs), default=0)
        self._printed: dict[str, str] = {}
        self._current: dict[str, str] = {}
        self._failures: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}
        self._gone_since: dict[str, float] = {}
        self._waits_since: dict[str, float] = {}
        self._seen_attempts = {job.name: {a.label for a in job.record.attempts()} for job in jobs}

    def run(self) -> dict[str, dict[str, Any]]:
        """Every stage's DONE.json by name. Raises what ends a stage for good; jobs of other stages continue."""
        while not self.step():
            time.sleep(POLL_SECONDS)
        return self.published

    def step(self) -> bool:
        """One pass; true when every stage is done.

        Raises ValueError (a user error, in the stage's words), StageFailed, StopRequested, StorageError.
        """
        try:
            live = self.scheduler.live()  # before the files: a job that ends in between has published
            unfinished = [job for job in self.jobs if job.name not in self.published]
            left = [job.name for job in unfinished if job.name in self._current and job.job_name not in live]
            ended = self.scheduler.ended([self._current[name] for name in left])
            self._expedite(live)
            for job in unfinished:
                with storage_errors(job.record.folder):
                    self._reconcile_job(job, live.get(job.job_name, []), ended)
        except SchedulerUnreachable as problem:
            self._print_once("scheduler", "pending", f"{problem}; jobs continue, trying again")
        return len(self.published) == len(self.jobs)

    def _expedite(self, live: dict[str, list[LiveJob]]) -> None:
        ours = (entry for job in self.jobs for entry in live.get(job.job_name, []))
        waiting = [entry.job for entry in ours if entry.state == "pending" and entry.reason == _WAITS]
        now = time.monotonic()
        self._waits_since = {job: self._waits_since.get(job, now) for job in waiting}
        self.scheduler.start_now([job for job in waiting if now - self._waits_since[job] >= _KILL_WAIT_SECONDS])

    def _reconcile_job(self, job: StageJob, live: list[LiveJob], ended: dict[str, Any]) -> None:
        done = job.record.done()
        if done is not None:
            self.published[job.name] = done
            if not live:
                job.record.cleanup()
            # The submission of a second driver, which still waits for its turn.
            self.scheduler.cancel([entry.job for entry in live if entry.state == "pending"])
            earlier = "" if job.name in self._printed else ", in an earlier run"
            self._print_once(job.name, "done", f"{done['seconds']:,.0f} s{earlier}")
            return
        if live:
            self._watch(job, live)
            return
        if any(name not in self.published for name in job.depends_on):
            return
        if job.name in self._current:
            now = time.monotonic()
            if now - self._gone_since.setdefault(job.name, now) < _VISIBILITY_SECONDS:
                return
            self._handle_end(job, ended)
        if time.monotonic() >= self._not_before.get(job.name, 0.0):
            self._submit(job)

    def _watch(self, job: StageJob, live: list[LiveJob]) -> None:
        entry = next((entry for entry in live if entry.state != "pending"), live[0])
        self._current[job.name] = entry.job
        self._gone_since.pop(job.name, None)
        if entry.reason == _HELD:
            self._count_failure(job, f"job {entry.job} could not be started on its node, and Slurm holds it")
            self.scheduler.release([entry.job])
            return
        where = f"on {entry.nodes}" if entry.nodes else f"({entry.reason})"
        self._print_once(job.name, entry.state, f"job {entry.job} {where}")

    def _handle_end(self, job: StageJob, ended: dict[str, Any]) -> None:
        """A job has left the queue and its stage is not done: find out why, and retry or give up."""
        number = self._current.pop(job.name)
        self._gone_since.pop(job.name)
        end = ended.get(number)
        word = f"job {number} ended {end.state} on {end.nodes}" if end else f"job {number} is gone"
        for folder in attempt_folders(job.record.folder):
            close_abandoned(folder, f"{KILLED} ({word})")
        attempts = job.record.attempts()
        new = [a for a in attempts if a.label not in self._seen_attempts[job.name]]
        self._seen_attempts[job.name] = {a.label for a in attempts}
        last = new[-1] if new else None
        if end and end.state == "CANCELLED":
            raise StopRequested(f"stage {job.name} was cancelled ({word})", by_user=True)
        if last and last.final and last.state == "interrupted":
            raise StopRequested(last.reason, by_user=True)
        reason = last.reason if last else f"{word} before the stage began; see {job.jobs_folder}"
        if last and last.final:
            raise ValueError(reason)
        self._count_failure(job, reason)
        wait = min(self.policy.backoff_seconds * 2 ** (self._failures[job.name] - 1), MAX_BACKOFF_SECONDS)
        self._not_before[job.name] = time.monotonic() + wait
        self._print_once(job.name, "again", f"in {wait:.0f} s: {reason}")

    def _count_failure(self, job: StageJob, reason: str) -> None:
        self._failures[job.name] += 1
        if self._failures[job.name] > self.policy.retries:
            raise StageFailed(
                f"stage {job.name} failed {self._failures[job.name]} times, last: {reason}; its attempts are in "
                f"{job.record.folder}; once that is fixed, the same command tries again"
            )

    def _submit(self, job: StageJob) -> None:
        bad = nodes_to_avoid(job.record.attempts(), self.policy.failures_per_node)
        try:
            number = self.scheduler.submit(job, exclude=bad)
        except SubmissionRefused:
            if not bad:
                raise
            # A node that failed before is better than none.
            number, bad = self.scheduler.submit(job), []
        self._current[job.name] = number
        without = f", not on {', '.join(bad)}" if bad else ""
        self._print_once(job.name, "pending", f"job {number} submitted{without}")

    def _print_once(self, name: str, state: str, remark: str) -> None:
        if self._printed.get(name) == state + remark:
            return
        self._printed[name] = state + remark
        line = Text.assemble((f"{name:<{self._width}}  ", ""), (f"{state:<12}", _STYLES[state]), remark)
        self._console.print(line, soft_wrap=True)


def nodes_to_avoid(attempts: Sequence[AttemptStatus], failures_per_node: int) -> list[str]:
    """Hosts on which that many attempts failed. Attempts that were killed or stopped do not count against a node."""
    failed = Counter(a.failed_on for a in attempts if a.state == "failed" and a.failed_on and not a.final)
    return sorted(host for host, count in failed.items() if count >= failures_per_node)


def submit_chain(jobs: Sequence[StageJob], scheduler: Slurm) -> dict[str, str]:
    """Submit every stage that is not done and not in the queue, after those it depends on; returns job ids by stage."""
    live = scheduler.live()
    numbers: dict[str, str] = {}
    for job in jobs:
        if job.record.done() is not None:
            continue
        mine = live.get(job.job_name)
        after = [numbers[name] for name in job.depends_on if name in numbers]
        numbers[job.name] = mine[0].job if mine else scheduler.submit(job, after=after)
    return numbers
