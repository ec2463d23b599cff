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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from halo_cluster.slurm.queue import live_jobs
from tests.fault_table import FaultRow
from tests.slurm_runs import ON_SLURM, TOGETHER, SlurmRun, run_command, trained_weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
SETTINGS = (*TOGETHER, "align.steps=120", "align.checkpoint_every=10", "align.watchdog_seconds=20")


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

    def finish(self, fault: str, seen: str, seconds: float, *, attempts: int | None = None) -> None:
        """The driver ends well, and everything is as if nothing had happened; `seen` goes into the table."""
        self.run.finish()
        equal = trained_weights(self.run.runs) == trained_weights(self.undisturbed)
        made = len(self.run.attempts())
        self.table.append(FaultRow(fault, seen, made, seconds, equal))
        assert equal
        done = Counter(path.parent.parent.name for path in self.run.runs.glob("tiny/*/*/DONE.json"))
        assert set(done.values()) == {1} and done.keys() == {
            path.parent.parent.name for path in self.undisturbed.glob("tiny/*/*/DONE.json")
        }
        if attempts is not None:
            assert made == attempts
        self.run.slurm.until(lambda: not live_jobs(), "an empty queue")

    def interrupted(self, fault: str, since: float, *words: str, attempts: int = 2) -> None:
        """Judge a fault that ended the first attempt: `words` are what `halo status` says of it during the next."""
        status, seconds = self.run.recovered(since, attempts - 1)
        (remark,) = [line for line in status.splitlines() if line.startswith("align restarted after: ")]
        for word in words:
            assert word in remark, status
        self.finish(
            fault,
            remark.removeprefix("align restarted after: ").replace(f"{self.run.runs}/", "runs/"),
            seconds,
            attempts=attempts,
        )


@pytest.fixture
def disturbed(slurm, recipe, undisturbed, fault_table, tmp_path) -> Iterator[Disturbed]:
    run = SlurmRun(slurm, recipe, tmp_path / "runs", (*SETTINGS, *ON_SLURM))
    run.begin_without_align(undisturbed)
    yield Disturbed(run, undisturbed, fault_table)
    run.end()


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
        f"process 1 of 2 was killed by SIGKILL on {node}",
        "from the last checkpoint",
    )


def test_kill_9_of_the_driver(training):
    run = training.run
    run.kill_driver()
    run.start()
    training.finish("kill -9 of the driver, started again", "", 0.0, attempts=1)


def test_requeue_by_an_operator(training):
    run = training.run
    since = time.monotonic()
    run.slurm.slurm("scontrol", "requeue", run.job().job)
    training.interrupted("scontrol requeue", since, "")
