"""Benchmarks that run without a GPU are run small; what they print of time is not looked at."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

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


def _multi_gpu(tmp_path, *options):
    """The rows of multi_gpu.json, after two gloo processes on this machine."""
    script = [sys.executable, str(BENCHMARKS / "multi_gpu.py"), "--out", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(
        [*script, "--disk", str(tmp_path), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "multi_gpu.json").read_text())["rows"]


def test_multi_gpu_benchmark(tmp_path):
    """Three layouts, which compare themselves with one process."""
    names = r"check fp32 align (one GPU|TP2|DP2 \+ distributed optimizer)$"
    rows = _multi_gpu(tmp_path, "--only", "correctness", "--rows", names)
    assert [row["verdict"] for row in rows.values()] == ["within"] * 3
    assert json.loads((tmp_path / "multi_gpu.json").read_text())["environment"]["torch"]
    assert [path.name for path in tmp_path.iterdir()] == ["multi_gpu.json"], "its checkpoints are gone"


RANK_THAT_FAILS_AT_A_ROW = """
import json, os, sys, time
from pathlib import Path
from halo_cluster.children import end_with_parent

end_with_parent()
folder = Path(sys.argv[1])
for number, row in enumerate(json.loads((folder / "rows.json").read_text())["rows"]):
    fails = row["name"] == "second"
    answer = {"error": "ValueError: no"} if fails else {"peak_memory": int(os.environ["RANK"])}
    (folder / f"part.{os.getpid()}").write_text(json.dumps(answer))
    (folder / f"part.{os.getpid()}").rename(folder / f"{number}.{os.environ['RANK']}.json")
    if fails:
        while len(list(folder.glob("0.*.json"))) < 2:  # ranks do their rows together
            time.sleep(0.05)
        sys.exit(1)
"""


def test_multi_gpu_rows_after_one_that_failed_are_done_by_new_processes(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    import multi_gpu
    from multi_gpu_plan import Row, WorldPlan

    program = tmp_path / "rank.py"
    program.write_text(RANK_THAT_FAILS_AT_A_ROW)
    monkeypatch.setattr(multi_gpu, "RANK_PROGRAM", program)
    row = Row("first", "speed", 2, {}, "align", "tiny", "fp32", 32, 8, 2)
    names = ["second", "third", "fourth"]
    rows = [row, *(replace(row, name=name, continues="second" if name == "third" else None) for name in names)]
    results = multi_gpu.Results(tmp_path, Console(quiet=True))
    results.planned = {row.name: row for row in rows}
    multi_gpu.run_world(WorldPlan("two", 2, rows), tmp_path, "cpu", results, time.time() + 100)
    assert {name: row.get("error") for name, row in results.content["rows"].items()} == {
        "first": None,
        "second": "ValueError: no",
        "third": "not run: it continues second",
        "fourth": None,
    }
    assert results.content["rows"]["fourth"]["peak_memory"] == 1, "the most of all ranks"


def test_multi_gpu_runs_nothing_after_the_time_given(tmp_path):
    rows = _multi_gpu(tmp_path, "--only", "correctness", "--rows", "check fp32 align", "--seconds", "0")
    assert {row["error"] for row in rows.values()} == {"not run: the time given was up"}
    assert len(rows) > 3
