"""Every fault that a training on Slurm has to survive, on a real one; make test-cluster prints the table.

Each row disturbs the align stage of a run, two ranks on two nodes. The other stages are done: they are those of a run
without Slurm and without a fault, whose align stage is also what the disturbed one has to equal bit by bit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
import yaml

from durable_files import read_json, write_json
from halo_cluster.slurm.queue import live_jobs
from tests.support.fault_table import FaultRow
from tests.support.halo import checked_halo
from tests.support.slurm_runs import ON_SLURM, TOGETHER, SlurmRun, run_command, slowed, trained_weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
SETTINGS = (*TOGETHER, "align.steps=120", "align.checkpoint_every=10", "align.watchdog_seconds=20")
WHICH = ("first", "second")


@pytest.fixture(scope="module")
def recipe(pipeline_recipe_content, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(pipeline_recipe_content))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(run_command(recipe, runs, SETTINGS), check=True, capture_output=True, timeout=250)
    return runs


@dataclass
class Disturbed:
    """A run whose align stage trains by now, and how its end is judged."""

    run: SlurmRun
    undisturbed: Path
    table: list[FaultRow]

    def finish(self, fault: str, seen: Callable[[], str], seconds: float, *, attempts: int) -> None:
        """The driver ends well, and everything is as if nothing had happened; what `seen` gives goes into the table."""
        self.run.finish()
        equal = trained_weights(self.run.runs) == trained_weights(self.undisturbed)
        made = len(self.run.attempts())
        self.table.append(FaultRow(fault, seen(), made, seconds, equal))
        assert equal
        done = Counter(path.parent.parent.name for path in self.run.runs.glob("tiny/*/*/DONE.json"))
        assert set(done.values()) == {1} and done.keys() == {
            path.parent.parent.name for path in self.undisturbed.glob("tiny/*/*/DONE.json")
        }
        assert made == attempts
        self.run.slurm.until(lambda: not live_jobs(), "an empty queue")

    def undisturbed_by(self, fault: str, seen: Callable[[], str], *words: str) -> None:
        """Judge a fault that training did not notice; `seen` is of what the driver said."""
        self.finish(fault, seen, 0.0, attempts=1)
        for word in words:
            assert word in seen()

    def interrupted(self, fault: str, since: float, *words: str, attempts: int = 2) -> None:
        """Judge a fault that ended the first attempt: `words` are what `halo status` says of it during the next."""
        status, seconds = self.run.recovered(since, attempts - 1)
        (remark,) = [line for line in status.splitlines() if line.startswith("align restarted after: ")]
        for word in words:
            assert word in remark, status
        seen = remark.removeprefix("align restarted after: ").replace(f"{self.run.runs}/", "runs/")
        self.finish(fault, lambda: seen, seconds, attempts=attempts)


@pytest.fixture
def disturbed(slurm, recipe, undisturbed, fault_table, tmp_path) -> Iterator[Disturbed]:
    run = SlurmRun(slurm, recipe, tmp_path / "runs", (*SETTINGS, *ON_SLURM))
    run.begin_without_align(undisturbed)
    yield Disturbed(run, undisturbed, fault_table)
    run.end()


@pytest.fixture
def training_on_small_disk(slurm, recipe, undisturbed, fault_table) -> Iterator[Disturbed]:
    folder = slurm.layout.shared / "disk"
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], check=True)
    run = SlurmRun(slurm, recipe, folder / "runs", (*SETTINGS, *ON_SLURM))
    try:
        run.begin_without_align(undisturbed)
        run.start()
        run.until_training()
        yield Disturbed(run, undisturbed, fault_table)
    finally:
        run.end()
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def training(disturbed) -> Disturbed:
    disturbed.run.start()
    disturbed.run.until_training()
    return disturbed


def test_kill_9_of_a_rank(training):
    run, node = training.run, training.run.nodes()[1]
    since = time.monotonic()
    os.kill(run.rank(node), signal.SIGKILL)
    training.interrupted(
        "kill -9 of a rank",
        since,
        f"rank 1 of 2 was killed by SIGKILL on {node}",
        "from the last checkpoint",
    )


@pytest.mark.parametrize("which", [0, 1], ids=["first_node", "second_node"])
def test_kill_9_of_the_stage_process(training, which):
    run, node = training.run, training.run.nodes()[which]
    since = time.monotonic()
    (pid,) = run.processes(node, "halo_jobs.stage_job")
    os.kill(pid, signal.SIGKILL)
    # Of the second node's, rank 0 may have time to say that rank 1 is gone.
    words = ("killed, or the machine stopped (job",) if which == 0 else ()
    training.interrupted(f"kill -9 of the stage process on the {WHICH[which]} node", since, *words)


def test_kill_9_of_the_driver(training):
    run = training.run
    run.kill_driver()
    run.start()
    fault = "kill -9 of the driver, started again"
    training.undisturbed_by(fault, lambda: run.shown()[0], "align running job")


@pytest.mark.parametrize("which", [0, 1], ids=["first_node", "second_node"])
def test_power_cut(training, which):
    run, node = training.run, training.run.nodes()[which]
    since = time.monotonic()
    run.slurm.control("power-cut", node)
    # Rank 0 outlives the second node and may say more.
    words = ("killed, or the machine stopped",) if which == 0 else ()
    training.interrupted(f"power cut of the {WHICH[which]} node", since, *words)


def test_node_declared_down(training):
    run, node = training.run, training.run.nodes()[1]
    since = time.monotonic()
    run.slurm.slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    training.interrupted("scontrol update state=down", since)


def test_requeue_by_an_operator(training):
    run = training.run
    since = time.monotonic()
    run.slurm.slurm("scontrol", "requeue", run.job().job)
    training.interrupted("scontrol requeue", since, "stopped by SIGTERM after step", "which is saved in")


@pytest.mark.parametrize("partition", ["batch", "grace"])
def test_preemption(disturbed, partition):
    run = disturbed.run
    run.start(f"cluster.partition={partition}")
    run.until_training()
    urgent = "--partition=urgent", "--nodes=4", "--exclusive"
    since = time.monotonic()
    run.slurm.sbatch(run.recipe.parent, "sleep 3\n", *urgent)
    disturbed.interrupted(
        f"preemption {'with' if partition == 'grace' else 'without'} grace",
        since,
        "stopped by SIG",
    )


def test_time_limit(disturbed):
    """Slurm checks limits twice a minute, so it may speak of one half a minute early: here after 45 to 75 s."""
    run = disturbed.run
    run.start("cluster.time_minutes=2", "cluster.grace_seconds=45")
    run.until_training()
    with slowed(run.rank(run.nodes()[1])):
        run.slurm.until(run.exits, "the warning before the time limit")
    disturbed.interrupted(
        "time limit", time.monotonic(), "stopped by SIGUSR2 after step", "which is saved in"
    )


def test_controller_killed_and_started_again(training):
    run = training.run
    reached = run.steps()
    with slowed(run.rank(run.nodes()[1])):
        run.slurm.control("restart-slurmctld", "--kill", "--after", "20")
        assert run.steps() > reached, "training goes on meanwhile"
    training.undisturbed_by(
        "kill -9 of slurmctld, started again after 20 s",
        lambda: next(line for line in run.said().splitlines() if line.startswith("scheduler")),
        "Unable to contact slurm controller",
        "jobs continue, trying again",
    )


def test_disk_full(training_on_small_disk):
    training = training_on_small_disk
    run = training.run
    filler = run.runs / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    assert run.drivers[-1].wait(timeout=200) == 1
    last = run.said().splitlines()[-1]
    assert (
        last.startswith("error: ") and "No space left on device" in last and "free some space there" in last
    )
    assert "No space left on device" in checked_halo("status", run.runs / "tiny")
    filler.unlink()
    since = time.monotonic()
    attempts = len(run.attempts())
    run.start()
    fault = "disk full; space made, started again"
    training.interrupted(fault, since, "No space left on device", attempts=attempts + 1)


def test_hung_rank(training):
    run, node = training.run, training.run.nodes()[1]
    pid = run.rank(node)
    since = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    training.interrupted("SIGSTOP of a rank", since, "no progress for 20 s after step", "rank 1")


def test_node_that_always_fails(disturbed):
    """Its torch cannot be loaded, as after a failed update."""
    run = disturbed.run
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    run.slurm.on_node("n2", "mount", "--bind", "/dev/null", str(library))
    since = time.monotonic()
    run.start()
    try:
        disturbed.interrupted(
            "a node that always fails", since, "libtorch_cpu.so: file too short", attempts=3
        )
    finally:
        run.slurm.control("power-cut", "n2")  # and with it the mount
    assert "submitted, not on n2" in run.said()
    assert [end["host"] for end in run.exits() if end["state"] == "failed"] == ["n2", "n2"]


def test_two_drivers_at_once(disturbed):
    run = disturbed.run
    first, _ = run.start(), run.start()
    disturbed.undisturbed_by("two drivers at once", lambda: run.shown()[-2], "align running job")
    assert first.wait(timeout=60) == 0, run.said(0)
    assert run.shown()[-2] in run.shown(0), "both looked after the same job"


def test_clock_that_goes_backwards(training):
    """The first attempt's clock was an hour ahead."""
    run = training.run
    since = time.monotonic()
    os.kill(run.rank(run.nodes()[0]), signal.SIGKILL)
    run.slurm.until(run.exits, "the end of the first attempt")
    (attempt,) = run.attempts()
    for name, key in (("started.json", "started"), ("exit.json", "ended")):
        content = read_json(attempt / name)
        content[key] = (datetime.fromisoformat(content[key]) + timedelta(hours=1)).isoformat()
        write_json(attempt / name, content)
    later = time.time() + 3600
    for path in attempt.iterdir():
        os.utime(path, (later, later))
    training.interrupted("a clock that goes backwards", since, "rank 0 of 2 was killed by SIGKILL")
    done = read_json(run.folder / "DONE.json")
    assert 0 < done["seconds"] < 600
    assert done["started"] <= done["finished"]
