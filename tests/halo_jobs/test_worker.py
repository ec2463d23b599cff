"""Training stages in two processes: what one trains, faults in a sentence, stops with everything saved."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from durable_files import read_json
from halo_cluster import Nodes
from halo_jobs.worker import join_processes
from tests.support.halo import halo_command, set_options

TWO = ("layout.processes=2", "layout.pipeline=2")


@pytest.fixture
def recipe(pipeline_recipe_content, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(pipeline_recipe_content))
    return path


def _start(recipe: Path, runs: Path, *changes: str) -> subprocess.Popen[str]:
    command = halo_command("run", recipe, "--runs", runs, *set_options(*changes))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _losses(runs: Path, stage: str) -> list[float]:
    (metrics,) = runs.glob(f"tiny/{stage}/*/metrics.jsonl")
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]


def _in_training(process: subprocess.Popen[str], runs: Path) -> Path:
    """The align stage's folder, once two steps are done."""
    while not (
        found := [p for p in runs.glob("tiny/align/*/metrics.jsonl") if p.read_text().count("\n") >= 2]
    ):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return found[0].parent


def _ranks(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        pid for pid in map(int, children) if b"halo_jobs.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_two_processes_train_what_one_trains(recipe, tmp_path):
    alone, together = tmp_path / "alone", Path(os.path.relpath(tmp_path)) / "together"
    for runs, changes in ((alone, ("precision=fp32",)), (together, ("precision=fp32", *TWO))):
        process = _start(recipe, runs, *changes)
        _, stderr = process.communicate(timeout=250)
        assert process.returncode == 0, stderr
    for stage in ("align", "distill.hybrid", "finetune.hybrid"):
        # Each stage begins where the one before ended, so rounding adds up.
        assert _losses(together, stage) == pytest.approx(_losses(alone, stage), rel=1e-3), stage


@pytest.mark.faults
def test_a_killed_process_ends_the_stage_in_a_sentence(recipe, tmp_path):
    process = _start(recipe, tmp_path / "runs", *TWO, "align.steps=100000")
    align = _in_training(process, tmp_path / "runs")
    first, second = _ranks(process)
    os.kill(second, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 of 2 was killed by SIGKILL; the same command resumes from the last checkpoint" in stderr
    assert not Path(f"/proc/{first}").exists()
    end = read_json(align / "attempt.1" / "exit.json")
    assert end["state"] == "failed" and "killed by SIGKILL" in end["reason"]


@pytest.mark.faults
def test_a_process_that_hangs_before_they_have_met_ends_the_stage_in_a_sentence(recipe, tmp_path):
    process = _start(recipe, tmp_path / "runs", *TWO, "align.watchdog_seconds=20")
    while len(ranks := _ranks(process)) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.kill(ranks[1], signal.SIGSTOP)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 1 of 2 did not arrive within 20 s" in stderr
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.faults
def test_a_killed_driver_takes_its_processes_along(recipe, tmp_path):
    process = _start(recipe, tmp_path / "runs", *TWO, "align.steps=100000")
    _in_training(process, tmp_path / "runs")
    ranks = _ranks(process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, f"{ranks} live on"
        time.sleep(0.1)


@pytest.mark.faults
def test_a_request_to_stop_reaches_all_processes(recipe, tmp_path):
    process = _start(recipe, tmp_path / "runs", *TWO, "align.steps=100000", "align.checkpoint_every=100000")
    align = _in_training(process, tmp_path / "runs")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    (checkpoint,) = (align / "checkpoints").iterdir()
    done = len((align / "metrics.jsonl").read_text().splitlines())
    assert checkpoint.name == f"step-{done:08d}"
    assert "align: stopped by SIGTERM" in stderr
    assert {path.name for path in checkpoint.glob("rank-*")} == {f"rank-0000{n}.safetensors" for n in (0, 1)}


def test_an_error_of_a_process_is_the_commands_error(recipe, tmp_path):
    process = _start(recipe, tmp_path / "runs", *TWO, "align.learning_rate=1e30", "align.warmup_steps=0")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "stage align failed: loss is nan at step 2" in stderr


@pytest.mark.timeout(30)
def test_other_nodes_do_not_wait_for_an_attempt_at_a_stage_that_is_done(tmp_path):
    (tmp_path / "DONE.json").write_text("{}")
    assert join_processes(tmp_path / "attempt.10.1", 2, Nodes(2, 1, "n1")) == 0
