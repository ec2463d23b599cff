"""The tasks of one fan-out, as files that workers and drivers share without locks and without a common clock.

results/<task>.json             arguments, result, who made it; published once
tries/<task>@<n>.claim.json     the n-th try belongs to this worker; published once, never withdrawn
      <task>@<n>.failed.json    it ended in an exception
      <task>@<n>.refused.json   it ended in a ValueError, which another try would repeat
      <task>@<n>.lost.json      its worker was lost
      <task>@<n>.reset.json     a failure of an earlier call, which later calls do not count
workers/<worker>.json           its process
        <worker>.heartbeat      rewritten every second
        <worker>.ended.json     the worker has ended, or has to
        <worker>.failed.json    its setup failed

A task can be claimed while it has no result and its newest try has ended. The worker that publishes the next claim has
the task: a hard link lets only one. A worker that was given up as lost may still finish: results are published once, so
the second one is dropped. Nothing ever waits for a file to be removed.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from durable_files import ProcessIdentity, publish_once, read_json
from halo_cluster.fan_out.plan import Plan, Task

SILENT_SECONDS = 30.0
"""A worker whose heartbeat does not change for this long, by the observer's clock, is given up as lost."""
MAX_LOSSES = 10
"""A task that loses its worker this often is at fault itself: it may exhaust the memory."""

_TRY = re.compile(r"(?P<task>[^@]+)@(?P<number>\d+)\.(?P<what>claim|failed|refused|lost|reset)\.json")


class FanOutFailed(RuntimeError):
    """The tasks cannot be finished; the message names the one at fault and where its traceback is."""


@dataclass(frozen=True)
class Claim:
    """Try `number` (from 1) at a task, held by `worker`."""

    task: str
    number: int
    worker: str


@dataclass(frozen=True)
class Failure:
    """Why a fan-out cannot continue: one sentence, whether the error is the user's, and the traceback if any."""

    sentence: str
    user_error: bool
    traceback: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Of an exception that is being handled; a ValueError is the user's."""
        lines = str(error).strip().splitlines()
        sentence = lines[0] if lines else type(error).__name__
        return cls(sentence, isinstance(error, ValueError), traceback.format_exc())


@dataclass
class _Tries:
    """The tries of one task: by number, the kinds of files that exist."""

    marks: dict[int, set[str]] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        return max(self.marks, default=0)

    @property
    def is_open(self) -> bool:
        """A worker has the task, as far as is known."""
        return self.newest > 0 and not self.marks[self.newest] - {"claim"}

    def count(self, what: str) -> int:
        return sum(what in marks for marks in self.marks.values())


class TaskPool:
    """One fan-out as seen from one process. Its only state in memory is when each heartbeat last changed."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        self.results, self.tries, self.workers = (folder / name for name in ("results", "tries", "workers"))
        for path in (self.results, self.tries, self.workers):
            path.mkdir(parents=True, exist_ok=True)
        self._holders: dict[Path, str] = {}
        self._last_beat: dict[str, tuple[str, float]] = {}

    # results

    def result_path(self, task: str) -> Path:
        return self.results / f"{task}.json"

    def published(self) -> set[str]:
        """Names of the plan's tasks that have a result."""
        names = {name.removesuffix(".json") for name in os.listdir(self.results) if name.endswith(".json")}
        return names & {task.name for task in self.plan.tasks}

    def read_result(self, task: Task) -> Any:
        """The published result; ValueError if it is of other arguments."""
        path = self.result_path(task.name)
        content = read_json(path)
        if content["arguments"] != task.arguments:
            raise ValueError(
                f"{path} is the result of other arguments; remove {self.folder} to compute it again"
            )
        return content["result"]

    def publish(self, claim: Claim, arguments: Any, result: Any, seconds: float) -> bool:
        """Make `result` the task's; False if another try was first."""
        content = {
            "arguments": arguments,
            "result": result,
            "worker": claim.worker,
            "try": claim.number,
            "seconds": round(seconds, 3),
        }
        return publish_once(self.result_path(claim.task), content)

    # tries

    def _try_path(self, task: str, number: int, what: str) -> Path:
        return self.tries / f"{task}@{number}.{what}.json"

    def _all_tries(self) -> dict[str, _Tries]:
        found = {task.name: _Tries() for task in self.plan.tasks}
        for name in os.listdir(self.tries):
            match = _TRY.fullmatch(name)
            if match and match["task"] in found:
                found[match["task"]].marks.setdefault(int(match["number"]), set()).add(match["what"])
        return found

    def claim(self, worker: str) -> Claim | None:
        """Claim the next free task for `worker`; None while there is none."""
        tries, published = self._all_tries(), self.published()
        for task in self.plan.tasks:
            mine = tries[task.name]
            if task.name in published or mine.is_open or self._is_exhausted(mine):
                continue
            claim = Claim(task.name, mine.newest + 1, worker)
            won = publish_once(self._try_path(claim.task, claim.number, "claim"), asdict(claim))
            # The try before may have been given up as lost, and have published since we looked.
            if won and not self.result_path(task.name).exists():
                return claim
        return None

    def fail(self, claim: Claim, failure: Failure) -> None:
        what = "refused" if failure.user_error else "failed"
        publish_once(self._try_path(claim.task, claim.number, what), asdict(failure))

    def _is_exhausted(self, tries: _Tries) -> bool:
        """No further try is allowed."""
        return (
            tries.count("refused") > 0
            or tries.count("failed") > self.plan.retries
            or tries.count("lost") >= MAX_LOSSES
        )

    def nothing_left(self) -> bool:
        """Every task has a result or is given up."""
        published, tries = self.published(), self._all_tries()
        return all(name in published or self._is_exhausted(own) for name, own in tries.items())

    def reset_failures(self) -> None:
        """Give failed tasks new tries: a driver calls this once, before it starts workers."""
        for name in os.listdir(self.tries):
            match = _TRY.fullmatch(name)
            if match and match["what"] in ("failed", "refused", "lost"):
                with suppress(FileNotFoundError):  # a second driver did
                    os.rename(self.tries / name, self._try_path(match["task"], int(match["number"]), "reset"))
        for path in self.workers.glob("*.failed.json"):
            path.unlink(missing_ok=True)

    def failure(self) -> Failure | None:
        """Why this fan-out cannot be finished; None while it can."""
        unmade = [Failure(**read_json(path)) for path in sorted(self.workers.glob("*.failed.json"))]
        for failure in unmade:
            if failure.user_error:
                return failure
        if len(unmade) > self.plan.retries:
            return replace(unmade[-1], sentence=f"no worker could be set up: {unmade[-1].sentence}")
        published = self.published()
        for task, tries in self._all_tries().items():
            if task not in published and self._is_exhausted(tries):
                return self._why_exhausted(task, tries)
        return None

    def _why_exhausted(self, task: str, tries: _Tries) -> Failure | None:
        if tries.count("lost") >= MAX_LOSSES:
            lost = f"task {task} lost its worker {MAX_LOSSES} times; it may need more memory than there is"
            return Failure(f"{lost}: look into {self.workers}", user_error=False)
        what = "refused" if tries.count("refused") else "failed"
        path = self._try_path(task, max(n for n, marks in tries.marks.items() if what in marks), what)
        try:
            said = Failure(**read_json(path))
        except ValueError:
            return None  # another driver has just reset it
        if said.user_error:
            return said
        times = f"task {task} failed {tries.count('failed')} times, the last time with: {said.sentence.rstrip('.')}"
        return Failure(f"{times}; the traceback is in {path}", False, said.traceback)

    # workers

    def register(self, worker: str) -> Path:
        """Register; returns the path of the worker's heartbeat."""
        publish_once(self.workers / f"{worker}.json", asdict(ProcessIdentity.current()))
        return self.workers / f"{worker}.heartbeat"

    def worker_failed(self, worker: str, failure: Failure) -> None:
        publish_once(self.workers / f"{worker}.failed.json", asdict(failure))

    def mark_ended(self, worker: str, reason: str) -> None:
        """Record that `worker` has ended, or has to."""
        if not self.has_to_end(worker):
            publish_once(self.workers / f"{worker}.ended.json", {"reason": reason})

    def has_to_end(self, worker: str) -> bool:
        return (self.workers / f"{worker}.ended.json").exists()

    def ended_workers(self) -> int:
        """How many workers have ended, in this call and in earlier ones."""
        return sum(name.endswith(".ended.json") for name in os.listdir(self.workers))

    def workers_named(self, prefix: str) -> list[str]:
        """Registered workers whose names begin with `prefix`."""
        return [path.stem for path in sorted(self.workers.glob(f"{prefix}*.json")) if "." not in path.stem]

    def _is_lost(self, worker: str) -> bool:
        """Known to have ended, or silent for SILENT_SECONDS while this process watched."""
        if self.has_to_end(worker):
            return True
        with suppress(ValueError):  # over NFS its claim may be seen before its name
            if ProcessIdentity.from_json(read_json(self.workers / f"{worker}.json")).has_ended():
                return True
        try:
            beat = (self.workers / f"{worker}.heartbeat").read_text()
        except FileNotFoundError:
            beat = ""
        now = time.monotonic()
        if worker not in self._last_beat or self._last_beat[worker][0] != beat:
            self._last_beat[worker] = (beat, now)
        return now - self._last_beat[worker][1] > SILENT_SECONDS

    def release_lost(self) -> None:
        """End the tries of lost workers, so that others can claim their tasks."""
        published = self.published()
        for task, tries in self._all_tries().items():
            if task in published or not tries.is_open:
                continue
            claim = self._try_path(task, tries.newest, "claim")
            if claim not in self._holders:
                self._holders[claim] = read_json(claim)["worker"]
            worker = self._holders[claim]
            if self._is_lost(worker):
                self.mark_ended(worker, "lost: it ended or stopped its heartbeat while it had a task")
                # It may have published just before it ended.
                if not self.result_path(task).exists():
                    publish_once(self._try_path(task, tries.newest, "lost"), {"worker": worker})
