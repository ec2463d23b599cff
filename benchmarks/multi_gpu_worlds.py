"""Sets of processes that work through rows, and who has which GPU meanwhile.

An exception on one rank leaves the others waiting in a collective for ever, so a world in which a row fails or takes
too long is killed whole; rows that were left are done by new processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol

from multi_gpu_plan import Row, WorldPlan

RANK_PROGRAM = Path(__file__).with_name("multi_gpu_ranks.py")
_SHARES = 2  # of a GPU: checks take one, what is timed takes all
_NEWS_SECONDS = 3.0
_FAREWELL_SECONDS = 20.0
_START_SECONDS = 180.0
_MOST_RESTARTS = 4
_PREPARED = 2  # waiting jobs whose processes import modules while others have the GPUs

Report = Callable[[str, dict[str, Any]], None]
"""Called with the name of a row and what came of it."""


class Job(Protocol):
    """Something that wants GPUs for a while."""

    name: str
    gpus: int
    shares: int
    after: set[str]
    """Rows that have to be over before, well or not."""

    def prepare(self) -> None:
        """It is soon to begin: what can be done without a GPU. May be called often, or not at all."""
        ...

    def begin(self, gpus: Sequence[int]) -> None: ...

    def advance(self) -> bool:
        """Look after it; False once it is over and its GPUs are free again."""
        ...

    def abandon(self, reason: str) -> None:
        """End it now; what it has not done is reported with `reason`."""
        ...


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    replies: int
    log: Path
    unread: bytes = b""

    def receive(self) -> list[dict[str, Any]]:
        """What it has said since the last look."""
        try:
            while content := os.read(self.replies, 65_536):
                self.unread += content
        except BlockingIOError:
            pass
        *lines, self.unread = self.unread.split(b"\n")
        return [json.loads(line) for line in lines]

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line.strip()[:400] for line in reversed(lines) if line.strip()), "it said nothing")

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its exit code is noticed at the next look


@dataclass
class World:
    """The processes of a WorldPlan. Prepared, they import modules; they touch a GPU once `begin` gives them one."""

    plan: WorldPlan
    scratch: Path
    device: str
    report: Report
    done: Set[str]
    """Rows that went well, by now."""
    restarts: int = 0
    _ranks: list[_Rank] = field(default_factory=list)
    _answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    _row: Row | None = None
    _gpus: Sequence[int] = ()
    _deadline: float = 0.0
    _trouble: float | None = None

    def __post_init__(self) -> None:
        self.name, self.gpus, self.after = self.plan.name, self.plan.ranks, self.plan.after
        self.shares = _SHARES if self.plan.alone else 1
        self._left = list(self.plan.rows)

    def prepare(self) -> None:
        if self._ranks:
            return
        logs = self.scratch / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for rank in range(self.gpus):
            receiving, sending = os.pipe()
            os.set_blocking(receiving, False)
            log = logs / f"{self.name.replace(' ', '_').replace(',', '')}.{rank}.txt"
            with open(log, "ab") as out:
                process = subprocess.Popen(
                    [sys.executable, str(RANK_PROGRAM), str(sending), str(self.scratch), self.device],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    pass_fds=(sending,),
                )
            os.close(sending)
            self._ranks.append(_Rank(process, receiving, log))

    def begin(self, gpus: Sequence[int]) -> None:
        self.prepare()
        self._gpus = gpus
        meeting = mkdtemp(dir=self.scratch)
        for number, rank in enumerate(self._ranks):
            rank.send(
                {
                    "RANK": str(number),
                    # Not by CUDA_VISIBLE_DEVICES: whatever asks for GPUs while it is imported would fix their numbers.
                    "LOCAL_RANK": str(gpus[number]),
                    "WORLD_SIZE": str(self.gpus),
                    "MASTER_ADDR": "127.0.0.1",
                    "HALO_RENDEZVOUS": meeting,
                }
            )
        self._answers, self._trouble = {}, None
        self._deadline = time.monotonic() + _START_SECONDS

    def advance(self) -> bool:
        now = time.monotonic()
        for number, rank in enumerate(self._ranks):
            for answer in rank.receive():
                self._answers[number] = answer
                if "error" in answer:
                    self._trouble = self._trouble or now
            if rank.process.poll() is not None and number not in self._answers:
                how = f"process {number} ended with code {rank.process.returncode}: {rank.last_words()}"
                self._answers[number] = {"error": how}
                self._trouble = self._trouble or now
        if self._trouble is not None:
            if len(self._answers) == self.gpus or now - self._trouble > _NEWS_SECONDS:
                errors = [answer["error"] for answer in self._answers.values() if "error" in answer]
                return self._give_up(errors[0])
            return True
        if len(self._answers) == self.gpus:
            return self._go_on()
        if now > self._deadline:
            return self._give_up(
                f"no end after {self._row.limit_seconds if self._row else _START_SECONDS:g} s"
            )
        return True

    def _go_on(self) -> bool:
        """The row in hand is done on all ranks, or they have met: the next one, if there is one."""
        if self._row is None:
            self.report("environment", self._answers[0])
        else:
            self.report(self._row.name, {**_together(self._answers), "gpus": list(self._gpus)})
        self._row, self._answers = self._next(), {}
        if self._row is None:
            self._end(kindly=True)
            return False
        self._deadline = time.monotonic() + self._row.limit_seconds
        for rank in self._ranks:
            rank.send(self._row.to_json())
        return True

    def _next(self) -> Row | None:
        """The next row that can be done. One that would go on from a row that failed is reported."""
        while self._left:
            row = self._left.pop(0)
            if row.continues is None or row.continues in self.done:
                return row
            self.report(row.name, {"error": f"not run: it goes on from {row.continues!r}, which failed"})
        return None

    def _give_up(self, error: str) -> bool:
        """Kill the world. What is left of its rows is done by new processes, unless that has been tried too often."""
        self._end(kindly=False)
        if self._row is not None:
            self.report(self._row.name, {"error": error})
        else:
            self.restarts += 1  # it was not a row's fault
        self._row = None
        if self._left and self.restarts < _MOST_RESTARTS:
            self.restarts += 1
            self.begin(self._gpus)
            return True
        self._report_left(f"not run: the processes did not start any more ({error})")
        return False

    def abandon(self, reason: str) -> None:
        self._end(kindly=False)
        if self._row is not None:
            self.report(self._row.name, {"error": reason})
        self._report_left(reason)

    def _report_left(self, reason: str) -> None:
        while self._left:
            self.report(self._left.pop(0).name, {"error": reason})

    def _end(self, *, kindly: bool) -> None:
        """Have no process any more, so that the memory of the GPUs is free. `kindly`: they may leave by themselves."""
        deadline = time.monotonic() + (_FAREWELL_SECONDS if kindly else 0.0)
        for rank in self._ranks:
            assert rank.process.stdin is not None
            rank.process.stdin.close() if kindly else rank.process.kill()
        for rank in self._ranks:
            try:
                rank.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
            os.close(rank.replies)
        self._ranks = []


def _together(answers: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One result of what all ranks say: the first one's, of memory the most, of shares of time the mean."""
    result = dict(answers[0])
    for key in result:
        values = [answer.get(key) for answer in answers.values()]
        if key.startswith("peak") and None not in values:
            result[key] = max(values)
        elif key.endswith("share") and None not in values:
            result[key] = sum(values) / len(values)
    return result


def run_jobs(jobs: Sequence[Job], gpus: int, end: float, over: Set[str]) -> None:
    """Begin each job when what it waits for is over (`over`, which grows) and its GPUs are free, in this order if
    possible; at `end` (monotonic) what is left is abandoned."""
    shares = Counter(dict.fromkeys(range(gpus), _SHARES))
    waiting, running = list(jobs), dict[int, tuple[Job, Sequence[int]]]()
    try:
        while waiting or running:
            if time.monotonic() > end:
                break
            for job in list(waiting):
                free = sorted(
                    (gpu for gpu in shares if shares[gpu] >= job.shares), key=lambda gpu: -shares[gpu]
                )
                if job.after <= over and len(free) >= job.gpus:
                    taken = sorted(free[: job.gpus])
                    shares.subtract(dict.fromkeys(taken, job.shares))
                    waiting.remove(job)
                    running[id(job)] = (job, taken)
                    job.begin(taken)
            for job in waiting[:_PREPARED]:
                job.prepare()
            if waiting and not running:  # what it waits for will never be over
                job = waiting.pop(0)
                missing = ", ".join(sorted(job.after - over)) or f"{job.gpus} GPUs"
                job.abandon(f"not run: it waits for {missing}")
            for key, (job, taken) in list(running.items()):
                if not job.advance():
                    del running[key]
                    shares.update(dict.fromkeys(taken, job.shares))
            time.sleep(0.02)
    finally:
        for job, _taken in [*running.values(), *((job, ()) for job in waiting)]:
            job.abandon("not run to its end: the time given was up")


def worlds(
    plans: Sequence[WorldPlan], scratch: Path, device: str, report: Report, done: Set[str]
) -> list[Job]:
    return [World(replace(plan), scratch, device, report, done) for plan in plans]
