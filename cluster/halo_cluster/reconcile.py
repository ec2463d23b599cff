"""Brings stages to DONE as jobs of a scheduler, by looking at what is and doing the next thing.

Nothing that matters is remembered: what is done stands in DONE.json, what runs in the scheduler's queue, under a name
that follows from the stage. So this may be killed at any instant, run twice at once, or never run again: jobs go on
without it, and two jobs of one name wait for each other (dependency singleton), of which the second finds the stage
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
from halo_cluster.jobs import LiveJob, Scheduler, SchedulerUnreachable, StageJob, SubmissionRefused
from halo_cluster.storage import storage_errors
from halo_cluster.trying import StageFailed, StopRequested

LOOK_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 600.0
# A network file system may show a new file some seconds late, so a job that has just left the queue gets this long.
_SIGHT_SECONDS = 5.0
# A job that was put back into the queue may be ending on its node for this long (KillWait of slurm.conf); begun there
# before that, Slurm finds it twice, holds it, and takes the node out of service.
_END_SECONDS = 30.0
_WAITS, _HELD = "BeginTime", "launch failed requeued held"
_STYLES = {"done": "green", "running": "cyan", "pending": "cyan", "ending": "cyan", "again": "yellow"}


@dataclass(frozen=True)
class Patience:
    """With stages that fail: how often each is tried again, how long after (doubling, up to LONGEST_WAIT_SECONDS), and
    on which nodes no more."""

    retries: int = 3
    backoff_seconds: float = 15.0
    failures_per_node: int = 2


class Reconciler:
    """`look` makes one pass over `jobs`, which are in running order; `run` repeats it to the end."""

    def __init__(
        self,
        jobs: Sequence[StageJob],
        scheduler: Scheduler,
        console: Console,
        patience: Patience | None = None,
    ) -> None:
        self.jobs = jobs
        self.scheduler = scheduler
        self.patience = patience or Patience()
        self.published: dict[str, dict[str, Any]] = {}
        self._console = console
        self._width = max((len(job.name) for job in jobs), default=0)
        self._said: dict[str, str] = {}
        self._current: dict[str, str] = {}
        self._failures: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}
        self._gone_since: dict[str, float] = {}
        self._waits_since: dict[str, float] = {}
        self._seen_attempts = {job.name: {a.label for a in job.record.attempts()} for job in jobs}

    def run(self) -> dict[str, dict[str, Any]]:
        """Every stage's DONE.json by name. Raises what ends a stage for good; jobs of other stages go on then."""
        while not self.look():
            time.sleep(LOOK_SECONDS)
        return self.published

    def look(self) -> bool:
        """One pass; true when every stage is done.

        Raises ValueError (the user's error, as the stage said it), StageFailed, StopRequested, StorageError.
        """
        try:
            live = self.scheduler.live()  # before the files: a job that ends in between has published
            ended = self.scheduler.ended(self._left_the_queue(live))
            self._hurry(live)
            for job in self.jobs:
                if job.name not in self.published:
                    with storage_errors(job.record.folder):
                        self._attend(job, live.get(job.job_name, []), ended)
        except SchedulerUnreachable as problem:
            self._say_once("scheduler", "pending", f"{problem}; jobs go on, trying again")
        return len(self.published) == len(self.jobs)

    def _left_the_queue(self, live: dict[str, list[LiveJob]]) -> list[str]:
        return [
            self._current[job.name]
            for job in self.jobs
            if job.name in self._current and job.name not in self.published and job.job_name not in live
        ]

    def _hurry(self, live: dict[str, list[LiveJob]]) -> None:
        ours = (entry for job in self.jobs for entry in live.get(job.job_name, []))
        waiting = [entry.job for entry in ours if entry.state == "pending" and entry.reason == _WAITS]
        now = time.monotonic()
        self._waits_since = {job: self._waits_since.get(job, now) for job in waiting}
        self.scheduler.start_now([job for job in waiting if now - self._waits_since[job] >= _END_SECONDS])

    def _attend(self, job: StageJob, live: list[LiveJob], ended: dict[str, Any]) -> None:
        done = job.record.done()
        if done is not None:
            self.published[job.name] = done
            if not live:
                job.record.settle()
            # A second driver's submission that waits for its turn to find this out.
            self.scheduler.cancel([entry.job for entry in live if entry.state == "pending"])
            earlier = "" if job.name in self._said else ", in an earlier run"
            self._say_once(job.name, "done", f"{done['seconds']:,.0f} s{earlier}")
            return
        if live:
            self._watch(job, live)
            return
        if any(name not in self.published for name in job.depends_on):
            return
        if job.name in self._current:
            now = time.monotonic()
            if now - self._gone_since.setdefault(job.name, now) < _SIGHT_SECONDS:
                return
            self._take_stock(job, ended)
        if time.monotonic() >= self._not_before.get(job.name, 0.0):
            self._submit(job)

    def _watch(self, job: StageJob, live: list[LiveJob]) -> None:
        entry = next((entry for entry in live if entry.state != "pending"), live[0])
        self._current[job.name] = entry.job
        self._gone_since.pop(job.name, None)
        if entry.reason == _HELD:
            self._count_failure(job, f"job {entry.job} could not be begun on its node, and Slurm holds it")
            self.scheduler.release([entry.job])
            return
        where = f"on {entry.nodes}" if entry.nodes else f"({entry.reason})"
        self._say_once(job.name, entry.state, f"job {entry.job} {where}")

    def _take_stock(self, job: StageJob, ended: dict[str, Any]) -> None:
        """A job is gone and the stage not done: why, and what follows from that."""
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
        wait = min(self.patience.backoff_seconds * 2 ** (self._failures[job.name] - 1), LONGEST_WAIT_SECONDS)
        self._not_before[job.name] = time.monotonic() + wait
        self._say_once(job.name, "again", f"in {wait:.0f} s: {reason}")

    def _count_failure(self, job: StageJob, reason: str) -> None:
        self._failures[job.name] += 1
        if self._failures[job.name] > self.patience.retries:
            raise StageFailed(
                f"stage {job.name} failed {self._failures[job.name]} times, last: {reason}; its attempts are in "
                f"{job.record.folder}; once that is mended, the same command tries again"
            )

    def _submit(self, job: StageJob) -> None:
        bad = nodes_to_avoid(job.record.attempts(), self.patience.failures_per_node)
        try:
            number = self.scheduler.submit(job, exclude=bad)
        except SubmissionRefused:
            if not bad:
                raise
            # Better on a node that failed before than on none.
            number, bad = self.scheduler.submit(job), []
        self._current[job.name] = number
        without = f", not on {', '.join(bad)}" if bad else ""
        self._say_once(job.name, "pending", f"job {number} submitted{without}")

    def _say_once(self, name: str, state: str, remark: str) -> None:
        if self._said.get(name) == state + remark:
            return
        self._said[name] = state + remark
        line = Text.assemble((f"{name:<{self._width}}  ", ""), (f"{state:<12}", _STYLES[state]), remark)
        self._console.print(line, soft_wrap=True)


def nodes_to_avoid(attempts: Sequence[AttemptStatus], failures_per_node: int) -> list[str]:
    """Hosts on which that many attempts failed; those that were killed or stopped say nothing about a node."""
    failed = Counter(a.failed_on for a in attempts if a.state == "failed" and a.failed_on and not a.final)
    return sorted(host for host, count in failed.items() if count >= failures_per_node)


def submit_chain(jobs: Sequence[StageJob], scheduler: Scheduler) -> dict[str, str]:
    """Submit all that is not done and not in the queue, each after what it depends on; job ids by stage."""
    live = scheduler.live()
    numbers: dict[str, str] = {}
    for job in jobs:
        if job.record.done() is not None:
            continue
        mine = live.get(job.job_name)
        after = [numbers[name] for name in job.depends_on if name in numbers]
        numbers[job.name] = mine[0].job if mine else scheduler.submit(job, after=after)
    return numbers
