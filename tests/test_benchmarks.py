"""Benchmarks that run without a GPU are run small; what they print of time is not looked at."""

import json
import subprocess
import sys
from pathlib import Path

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
    assert len(results["beside the training"]) == len(results["training waits"]) == 2
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
