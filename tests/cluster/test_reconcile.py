"""The reconciler against a scheduler of our own, in which every fault can be had at will. The real one: test_slurm."""

import io
import json
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from rich.console import Console

from halo_cluster import StageFailed, StopRequested
from halo_cluster.execution import execute_attempt
from halo_cluster.jobs import EndedJob, LiveJob, SchedulerUnreachable, StageJob, SubmissionRefused
from halo_cluster.reconcile import Reconciler, RetryPolicy, nodes_to_avoid, submit_chain
from halo_cluster.record import StageRecord

NOW = RetryPolicy(retries=2, backoff_seconds=0.0)


@dataclass
class Queue:
    """Jobs stay in it until a test takes them out."""

    jobs: dict[str, LiveJob] = field(default_factory=dict)
    submissions: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = field(default_factory=list)
    ends: dict[str, EndedJob] = field(default_factory=dict)
    expedited: list[str] = field(default_factory=list)
    calls: int = 0
    away: bool = False

    def live(self):
        self.calls += 1
        if self.away:
            raise SchedulerUnreachable("`squeue` gave no answer in 60 s")
        found: dict[str, list[LiveJob]] = {}
        for entry in self.jobs.values():
            found.setdefault(entry.name, []).append(entry)
        return found

    def ended(self, jobs):
        return {job: self.ends[job] for job in jobs if job in self.ends}

    def submit(self, job, *, after=(), exclude=()):
        if exclude == ["everything"]:
            raise SubmissionRefused("Requested node configuration is not available")
        number = str(len(self.submissions) + 1)
        self.submissions.append((job.name, tuple(after), tuple(exclude)))
        self.jobs[number] = LiveJob(number, job.job_name, "running", "None", "n1")
        return number

    def cancel(self, jobs):
        for job in jobs:
            del self.jobs[job]

    def start_now(self, jobs):
        self.expedited += jobs

    def release(self, jobs):
        for job in jobs:
            self.jobs[job] = replace(self.jobs[job], reason="Priority")

    def leave(self, number: str, state: str = "FAILED") -> None:
        del self.jobs[number]
        self.ends[number] = EndedJob(number, state, "n1")


@pytest.fixture(autouse=True)
def no_network_file_system(monkeypatch):
    monkeypatch.setattr("halo_cluster.reconcile._VISIBILITY_SECONDS", 0.0)


def stage(run: Path, name: str, *inputs: str) -> StageJob:
    return StageJob(name, StageRecord(run / name / "0123456789ab"), {"stage": name}, depends_on=inputs)


def finish(job: StageJob, label: str = "1.0") -> None:
    attempt = job.record.begin_attempt(label)
    output = job.record.folder / "output"
    output.write_text("made")
    attempt.publish([output], {})


def fail(job: StageJob, label: str, error: Exception) -> None:
    with pytest.raises(type(error) if isinstance(error, (ValueError, StopRequested)) else StageFailed):
        execute_attempt(job.name, job.record.begin_attempt(label), lambda attempt: (_ for _ in ()).throw(error))


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "runs" / "mine"


def reconciler(queue, *jobs) -> Reconciler:
    return Reconciler(jobs, queue, Console(quiet=True), NOW)


def test_a_stage_waits_for_its_inputs(run):
    queue, first, second = Queue(), stage(run, "align"), stage(run, "distill", "align")
    loop = reconciler(queue, first, second)
    assert not loop.step() and [name for name, *_ in queue.submissions] == ["align"]
    finish(first)
    queue.leave("1", "COMPLETED")
    assert not loop.step() and [name for name, *_ in queue.submissions] == ["align", "distill"]
    finish(second)
    assert loop.step()
    assert set(loop.published) == {"align", "distill"}


def test_done_stages_are_skipped_and_live_jobs_adopted(run):
    queue, first, second = Queue(), stage(run, "align"), stage(run, "distill", "align")
    finish(first)
    reconciler(queue, first, second).step()
    loop = reconciler(queue, first, second)  # the driver was killed, and started again
    loop.step()
    assert [name for name, *_ in queue.submissions] == ["distill"]


@pytest.mark.parametrize("live", [False, True])
def test_what_killed_attempts_of_a_done_stage_left_is_removed_once_none_is_live(run, live):
    job, queue = stage(run, "align"), Queue()
    killed = job.record.begin_attempt("1.0").folder
    finish(job, "2.0")
    (left := killed / "rank-0.json.unfinished-0a1b2c3d").write_text("half")
    if live:
        queue.jobs["7"] = LiveJob("7", job.job_name, "ending", "None", "n1")
    assert reconciler(queue, job).step()
    assert left.exists() == live


def test_the_second_drivers_job_is_taken_back_when_the_stage_is_done(run):
    queue, job = Queue(), stage(run, "align")
    loop = reconciler(queue, job)
    loop.step()
    queue.jobs["2"] = LiveJob("2", job.job_name, "pending", "Dependency", "")
    finish(job)
    assert loop.step()
    assert list(queue.jobs) == ["1"], "a running job of that name is publishing it"


def test_failures_are_tried_again_up_to_a_budget(run):
    queue, job = Queue(), stage(run, "align")
    loop = reconciler(queue, job)
    for number in ("1", "2"):
        loop.step()
        fail(job, f"{number}.0", RuntimeError("the link went down"))
        queue.leave(number)
        loop.step()
    fail(job, "3.0", RuntimeError("the link went down"))
    queue.leave("3")
    with pytest.raises(StageFailed, match="align failed 3 times, last: the link went down"):
        loop.step()


def test_the_wait_between_tries_doubles_up_to_a_limit(run):
    queue, job = Queue(), stage(run, "align")
    said = Console(file=io.StringIO(), width=200)
    loop = Reconciler([job], queue, said, RetryPolicy(retries=8, backoff_seconds=15.0))
    for number in range(1, 9):
        loop._submit(job)
        fail(job, f"{number}.0", RuntimeError("the link went down"))
        queue.leave(str(number))
        loop.step()
    waits = [int(seconds) for seconds in re.findall(r"in (\d+) s:", said.file.getvalue())]
    assert waits == [15, 30, 60, 120, 240, 480, 600, 600]


def test_user_errors_are_not_tried_again(run):
    queue, job = Queue(), stage(run, "align")
    loop = reconciler(queue, job)
    loop.step()
    fail(job, "1.0", ValueError("align.steps is 0; make it 1"))
    queue.leave("1")
    with pytest.raises(ValueError, match="make it 1"):
        loop.step()
    assert len(queue.submissions) == 1
    # Once it is fixed, the same command tries again, although that attempt is still the last one.
    reconciler(queue, job).step()
    assert len(queue.submissions) == 2


def test_a_stop_on_request_and_scancel_end_the_driver(run):
    for end, reason in (("FAILED", "stopped by the file"), ("CANCELLED", "was cancelled")):
        queue, job = Queue(), stage(run / end, "align")
        loop = reconciler(queue, job)
        loop.step()
        fail(job, "1.0", StopRequested("align: stopped by the file stop", by_user=True))
        queue.leave("1", end)
        with pytest.raises(StopRequested, match=reason):
            loop.step()


def test_a_job_that_dies_without_a_word_is_named_by_the_scheduler(run):
    queue, job = Queue(), stage(run, "align")
    loop = reconciler(queue, job)
    loop.step()
    job.record.begin_attempt("1.0")
    queue.leave("1", "NODE_FAIL")
    loop.step()
    (attempt, *_) = job.record.attempts()
    assert attempt.state == "interrupted"
    assert "job 1 ended NODE_FAIL on n1" in attempt.reason
    assert len(queue.submissions) == 2


def test_a_node_that_fails_twice_is_avoided(run):
    queue, job = Queue(), stage(run, "align")
    for label in ("1.0", "2.0"):
        attempt = job.record.begin_attempt(label)
        attempt.end("failed", "GPU is lost", host="n3")
    attempt = job.record.begin_attempt("3.0")
    attempt.end("failed", "rank 1 is gone", host="")
    assert nodes_to_avoid(job.record.attempts(), 2) == ["n3"]
    reconciler(queue, job).step()
    assert queue.submissions == [("align", (), ("n3",))]


def test_requeued_jobs_do_not_wait_two_minutes_but_until_they_have_ended(run, monkeypatch):
    queue, job = Queue(), stage(run, "align")
    loop = reconciler(queue, job)
    loop.step()
    queue.jobs["1"] = LiveJob("1", job.job_name, "pending", "BeginTime", "")
    loop.step()
    assert not queue.expedited, "begun at once on a node where it is still ending, Slurm would drain that node"
    monkeypatch.setattr("halo_cluster.reconcile._KILL_WAIT_SECONDS", 0.0)
    loop.step()
    assert queue.expedited == ["1"]


def test_a_job_that_no_node_would_begin_is_released_up_to_the_budget(run):
    queue, job = Queue(), stage(run, "align")
    loop = reconciler(queue, job)
    loop.step()
    held = LiveJob("1", job.job_name, "pending", "launch failed requeued held", "")
    for _ in range(2):
        queue.jobs["1"] = held
        loop.step()
        assert queue.jobs["1"].reason == "Priority"
    queue.jobs["1"] = held
    with pytest.raises(StageFailed, match="align failed 3 times, last: job 1 could not be started on its node"):
        loop.step()


def test_a_controller_that_is_away_is_waited_for(run):
    queue, job = Queue(), stage(run, "align")
    loop = reconciler(queue, job)
    loop.step()
    queue.away = True
    assert not loop.step()
    queue.away = False
    finish(job)
    assert loop.step() and len(queue.submissions) == 1


def test_two_runs_of_one_name_have_jobs_of_different_names(tmp_path):
    names = {stage(tmp_path / user / "runs" / "mine", "align").job_name for user in ("ada", "grace")}
    assert len(names) == 2


def test_a_chain_names_what_each_job_waits_for(run):
    queue = Queue()
    jobs = [stage(run, "init"), stage(run, "align", "init"), stage(run, "select", "init", "align")]
    finish(jobs[0])
    assert submit_chain(jobs, queue) == {"align": "1", "select": "2"}
    assert queue.submissions == [("align", (), ()), ("select", ("1",), ())]
    assert submit_chain(jobs, queue) == {"align": "1", "select": "2"}, "a second submission adopts the first"


LARGE = """
    import json, sys, time
    from pathlib import Path
    from rich.console import Console
    from halo_cluster.jobs import LiveJob, StageJob
    from halo_cluster.reconcile import Reconciler
    from halo_cluster.record import StageRecord

    class Queue:
        calls = 0
        def live(self):
            self.calls += 1
            return {job.job_name: [LiveJob(str(n), job.job_name, "running", "None", "n1")]
                    for n, job in enumerate(jobs) if n % 2}
        def ended(self, jobs): self.calls += 1; return {}
        def cancel(self, jobs): pass
        def start_now(self, jobs): pass
        def submit(self, job, after=(), exclude=()): raise AssertionError("nothing is to be submitted")

    run = Path(sys.argv[1])
    jobs = [StageJob(f"stage{n}", StageRecord(run / f"stage{n}" / "0123456789ab"), {}) for n in range(500)]
    for n, job in enumerate(jobs):
        if n % 2 == 0:
            job.record.folder.mkdir(parents=True)
            content = {"stage": job.name, "input_hash": "0123456789ab", "attempt": "1.0", "started": "", "finished": "",
                       "seconds": 1.0, "outputs": {}, "bytes": {}, "summary": {}}
            (job.record.folder / "DONE.json").write_text(json.dumps(content))
    queue, begun = Queue(), time.monotonic()
    Reconciler(jobs, queue, Console(quiet=True)).step()
    seconds = time.monotonic() - begun
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "calls": queue.calls,
                      "megabytes": int(peak.split()[1]) / 1024}))
"""


def test_five_hundred_stages_take_two_calls_and_little_memory(run):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LARGE), str(run)], capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    print(facts)
    assert facts["calls"] == 2
    assert facts["megabytes"] < 200
