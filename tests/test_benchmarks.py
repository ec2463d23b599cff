"""Benchmarks that run without a GPU are run small; what they print of time is not looked at."""

import json
import subprocess
import sys
import time
from pathlib import Path

from halo_cluster.slurm.queue import live_jobs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_checkpoint_benchmark(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "checkpoints.py"),
        "--model",
        "tiny",
        "--context-length",
        "64",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--disk", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "checkpoints.json").read_text())
    # bf16 weights; fp32 master weights and two moments.
    assert results["bytes"] >= 14 * results["parameters"]
    assert (len(results["beside the training"]), len(results["training waits"])) == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints.json"], "its checkpoints are gone"


def test_sweep_benchmark(tmp_path):
    """It checks every result by itself."""
    command = [sys.executable, str(BENCHMARKS / "sweep.py"), str(tmp_path / "sweep"), "--backends", "local"]
    done = subprocess.run(
        [*command, "--seconds", "1", "--json", str(tmp_path / "sweep.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "sweep.json").read_text())
    (undisturbed,), (half_lost,) = results["undisturbed"], results["half_lost"]
    assert (undisturbed["executions"], half_lost["executions"]) == (37, 39)
    assert half_lost["published_when_lost"] >= 14
    assert half_lost["published_executed_again"] == 0


def test_reconcile_benchmark(slurm, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "reconcile.py"), str(tmp_path / "run"), "--stages", "12"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "reconcile.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "reconcile.json").read_text())
    assert results["first_look"]["calls"] == {"squeue": 1}
    assert not live_jobs()


def test_multi_gpu_benchmark(tmp_path):
    """Two gloo processes, three layouts. Its rows compare themselves with one process."""
    script = [sys.executable, str(BENCHMARKS / "multi_gpu.py"), "--out", str(tmp_path), "--device", "cpu"]
    rows = r"check fp32 align (one GPU|TP2|DP2 \+ distributed optimizer)$"
    done = subprocess.run(
        [*script, "--only", "correctness", "--rows", rows, "--disk", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "multi_gpu.json").read_text())
    assert [row["verdict"] for row in results["rows"].values()] == ["within"] * 3
    assert results["environment"]["torch"]
    assert [path.name for path in tmp_path.iterdir()] == ["multi_gpu.json"], "its checkpoints are gone"


def test_multi_gpu_jobs(monkeypatch, tmp_path):
    """What waits for a row that nobody will do is ended with that reason; an ended `halo run` is not started again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from multi_gpu_faults import HaloRun
    from multi_gpu_worlds import run_jobs

    said, over = {}, set()

    class Fake:
        gpus, shares = 1, 1

        def __init__(self, name, after):
            self.name, self.after = name, after

        def prepare(self):
            pass

        def begin(self, gpus):
            said[self.name] = "begun"

        def advance(self):
            over.add(self.name)
            return False

        def abandon(self, reason):
            said[self.name] = reason

    jobs = [Fake("second", {"first"}), Fake("third", {"missing"}), Fake("first", set())]
    run_jobs(jobs, 1, time.monotonic() + 60, over)
    assert said == {"first": "begun", "second": "begun", "third": "not run: it waits for missing"}

    run = HaloRun("halo run", 2, tmp_path, "cpu", said.__setitem__, kill=True)
    run.abandon("given up")
    monkeypatch.setattr(run, "_killed", lambda visible: run._start(visible, tmp_path / "log.txt"))
    run._run("")
    assert not list(tmp_path.iterdir())
    assert not run.advance()
    assert said["halo run"] == {"error": "RuntimeError: given up before it started"}
