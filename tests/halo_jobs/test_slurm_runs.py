"""Runs on a real Slurm: the bits of a run without one, whatever dies on the way; no job is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from halo_cluster.slurm.queue import live_jobs
from tests.support.slurm_runs import ON_SLURM, TOGETHER, SlurmRun, run_command, trained_weights

SETTINGS = (*TOGETHER, "align.steps=30")


@pytest.fixture(scope="module")
def recipe(pipeline_recipe_content, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(pipeline_recipe_content))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> Path:
    """The same recipe without Slurm and without a fault."""
    runs = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(run_command(recipe, runs, SETTINGS), check=True, capture_output=True, timeout=250)
    return runs


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_run_survives_a_killed_rank_a_killed_driver_and_a_requeue(slurm, recipe, undisturbed, tmp_path):
    run = SlurmRun(slurm, recipe, tmp_path / "runs", (*SETTINGS, *ON_SLURM))
    run.start()
    run.until_training()
    os.kill(run.rank(run.nodes()[1]), signal.SIGKILL)
    slurm.until(lambda: len(run.exits()) == 1, "the end of the first attempt")
    run.kill_driver()
    run.start()
    slurm.until(lambda: len(run.attempts()) == 2, "the next attempt")
    slurm.slurm("scontrol", "requeue", run.job().job)
    run.finish()
    assert trained_weights(run.runs) == trained_weights(undisturbed)
    first = run.exits()[0]
    assert first["state"] == "failed" and "was killed by SIGKILL" in first["reason"]
    assert not live_jobs(), "no job is left in the queue"


def test_a_chain_is_submitted_at_once_and_cancelled(slurm, recipe, tmp_path):
    runs = tmp_path / "runs"
    command = run_command(recipe, runs, (*SETTINGS, *ON_SLURM), "--executor", "slurm", "--detach")
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
    queued = live_jobs()
    # The first may have ended by now; none was submitted twice.
    assert len(queued) >= 7 and all(len(jobs) == 1 for jobs in queued.values())
    cancel = [sys.executable, "-m", "halo_jobs.cli", "cancel", str(runs / "tiny")]
    subprocess.run(cancel, check=True, capture_output=True, timeout=60)
    slurm.until(lambda: not live_jobs(), "an empty queue")
