"""Runs on a real Slurm: the bits of a run without one, whatever dies on the way; no job is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from durable_files import read_json
from halo_cluster.slurm.queue import live_jobs

TOGETHER = ("layout.processes=2", "layout.pipeline=2", "select.baselines=[]", "align.steps=30")
ON_SLURM = ("cluster.nodes=2", "cluster.time_minutes=20", "cluster.backoff_seconds=1")


def _command(recipe: Path, runs: Path, settings: tuple[str, ...], *options: str) -> list[str]:
    words = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-m", "halo_jobs.cli", "run", str(recipe), "--runs", str(runs), *words, *options]


@pytest.fixture(scope="module")
def recipe(pipeline_recipe_content, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(pipeline_recipe_content))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> Path:
    """The same recipe without Slurm and without a fault."""
    runs = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(_command(recipe, runs, TOGETHER), check=True, capture_output=True, timeout=250)
    return runs


def _outputs(runs: Path) -> dict[str, dict[str, str]]:
    """Checksums of the weights that every training stage published, by stage."""
    records = {path.parent.parent.name: read_json(path) for path in runs.glob("tiny/*/*/DONE.json")}
    trained = ("align", "distil.hybrid", "finetune.hybrid")
    return {
        stage: {name: digest for name, digest in records[stage]["outputs"].items() if "safetensors" in name}
        for stage in trained
    }


def _in_training(driver: subprocess.Popen[str], runs: Path) -> Path:
    """The align stage's folder, once three steps are done."""
    while not (
        found := [p for p in runs.glob("tiny/align/*/metrics.jsonl") if p.read_text().count("\n") >= 3]
    ):
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.05)
    return found[0].parent


def _workers() -> list[int]:
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"halo_jobs.worker" in path.read_bytes()
    ]


@pytest.mark.timeout(600)
def test_a_run_survives_a_killed_rank_a_killed_driver_and_a_requeue(slurm, recipe, undisturbed, tmp_path):
    runs = tmp_path / "runs"
    command = _command(recipe, runs, (*TOGETHER, *ON_SLURM), "--executor", "slurm")

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    driver = start()
    align = _in_training(driver, runs)
    os.kill(_workers()[-1], signal.SIGKILL)
    slurm.until(lambda: len(list(align.glob("attempt.*/exit.json"))) == 1, "the end of the first attempt")
    driver.kill()
    driver.communicate()
    driver = start()
    slurm.until(lambda: len(list(align.glob("attempt.*"))) == 2, "the next attempt")
    (job,) = [entry.job for name, jobs in live_jobs().items() if ".align." in name for entry in jobs]
    slurm.slurm("scontrol", "requeue", job)
    said, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, said
    assert _outputs(runs) == _outputs(undisturbed)
    first = read_json(min(align.glob("attempt.*/exit.json")))
    assert first["outcome"] == "failed" and "was killed by SIGKILL" in first["reason"]
    assert not live_jobs(), "no job is left in the queue"


def test_a_chain_is_submitted_at_once_and_cancelled(slurm, recipe, tmp_path):
    runs = tmp_path / "runs"
    command = _command(recipe, runs, (*TOGETHER, *ON_SLURM), "--executor", "slurm", "--detach")
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
    queued = live_jobs()
    # The first may have ended by now; none was submitted twice.
    assert len(queued) >= 7 and all(len(jobs) == 1 for jobs in queued.values())
    cancel = [sys.executable, "-m", "halo_jobs.cli", "cancel", str(runs / "tiny")]
    subprocess.run(cancel, check=True, capture_output=True, timeout=60)
    slurm.until(lambda: not live_jobs(), "an empty queue")
