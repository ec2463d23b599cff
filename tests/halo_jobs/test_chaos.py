"""The demo's pipeline on a real Slurm with a random fault every 20 s, for its whole length: the bits of a calm run.

`make test-chaos` does it HALO_CHAOS_RUNS times (10). HALO_TEST_SEED chooses the faults and their moments.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from durable_files import TEMPORARY_MARK, read_json
from halo_cluster.slurm.queue import live_jobs
from halo_jobs.recipe import SHIPPED_RECIPES
from scripts.slurm_sandbox.nodes import processes_of_jobs
from tests.support.random_faults import RandomFaults

RUNS = int(os.environ.get("HALO_CHAOS_RUNS", "10"))
SEED = int(os.environ.get("HALO_TEST_SEED", "1"))
FAULT_EVERY_SECONDS = 20.0
LONGEST_SECONDS = 3000.0

_TRAINING = {
    "context_length": 128,
    "global_batch": 8,
    "micro_batch": 8,
    "warmup_steps": 2,
    "checkpoint_every": 4,
}
# Soon noticed when it hangs, tried again often: what one would ask for in such weather.
_WATCHED = {"watchdog_seconds": 30}
CHANGES = {
    "align": {**_TRAINING, **_WATCHED, "steps": 24},
    "select": {"context_length": 128, "items": 6},
    "distill": {**_TRAINING, **_WATCHED, "steps": 16},
    "finetune": {"steps": 6, "context_length": 256, "warmup_steps": 2, "checkpoint_every": 2, **_WATCHED},
    "calibrate": {"context_length": 512, "windows": 2},
    "evaluate": {"contexts": [128, 256], "needle_items": 1, "suite_items": 6},
    "layout": {"processes": 2, "pipeline": 2},
    "cluster": {"nodes": 2, "time_minutes": 10, "retries": 30, "backoff_seconds": 1},
}
# Killed, the command is started again; what else it ends with, stands.
LOOK_AFTER = 'while :; do "$@"; code=$?; [ $code -gt 128 ] || exit $code; sleep 1; done'

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(LONGEST_SECONDS + 300)]


@dataclass
class Outcome:
    """A run: what happened to it, and whether it passed."""

    number: int
    faults: RandomFaults
    attempts: int = 0
    seconds: float = 0.0
    passed: bool = False

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.counts.items()))
        end = "bit-equal" if self.passed else "FAILED"
        return (
            f"run {self.number}: {self.faults.counts.total()} faults ({kinds}), {self.attempts} attempts, "
            f"{self.seconds:.0f} s, {end}"
        )


@dataclass
class Table:
    """All runs, printed as a Markdown table at the end."""

    calm_seconds: float
    outcomes: list[Outcome] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = sorted({kind for outcome in self.outcomes for kind in outcome.faults.counts})
        lines = [
            f"| run | {' | '.join(kinds)} | faults | attempts | seconds | |",
            "|---" * (len(kinds) + 5) + "|",
        ]
        for o in self.outcomes:
            cells = [
                o.number,
                *(o.faults.counts[kind] for kind in kinds),
                o.faults.counts.total(),
                o.attempts,
            ]
            end = "bit-equal" if o.passed else "FAILED"
            lines.append(f"| {' | '.join(map(str, cells))} | {o.seconds:.0f} | {end} |")
        return "\n".join(lines)


def _command(recipe: Path, runs: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "halo_jobs.cli", "run", str(recipe), "--runs", str(runs), *options]


def _without_times(name: str, path: Path, digest: str) -> Any:
    """What can be the same in two runs: the checksum, or of files that speak of times the rest of them."""
    if name == "metrics.jsonl":
        speeds = {"tokens_per_second", "elapsed_seconds", "host_memory_bytes", "gpu_memory_bytes"}
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in speeds} for row in rows]
    if path.name == "README.md":
        return re.sub(r"\| [\d.,]+ (s|min|h)( \d+ (s|min))? \|", "| |", path.read_text())
    if path.name == "SHA256SUMS":
        return [line for line in path.read_text().splitlines() if "README.md" not in line]
    return digest


def _outputs(runs: Path) -> dict[str, dict[str, Any]]:
    """All that every stage published, by stage; exactly one DONE.json each."""
    found: dict[str, dict[str, Any]] = {}
    for path in runs.glob("demo/*/*/DONE.json"):
        record = read_json(path)
        assert record["stage"] not in found, f"stage {record['stage']} is done twice"
        found[record["stage"]] = {
            name: _without_times(name, path.parent / name, digest)
            for name, digest in record["outputs"].items()
        }
    return found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    content = yaml.safe_load((SHIPPED_RECIPES / "demo.yaml").read_text())
    for section, changes in CHANGES.items():
        content[section] = {**content.get(section, {}), **changes}
    path = tmp_path_factory.mktemp("recipe") / "demo.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def calm(recipe, tmp_path_factory) -> tuple[dict[str, dict[str, Any]], float]:
    """The same recipe without Slurm and without a fault: its outputs, and how long it took."""
    runs, began = tmp_path_factory.mktemp("calm"), time.monotonic()
    subprocess.run(_command(recipe, runs), check=True, capture_output=True, timeout=LONGEST_SECONDS)
    return _outputs(runs), time.monotonic() - began


@pytest.fixture(scope="module")
def table(calm) -> Iterator[Table]:
    outputs, seconds = calm
    table = Table(seconds)
    print(f"\ncalm run on this machine: {len(outputs)} stages, {seconds:.0f} s; seed {SEED}", flush=True)
    yield table
    print(f"\n{table}", flush=True)


def _attempts(runs: Path) -> int:
    return len(list(runs.glob("demo/*/*/attempt.*")))


def _left_over(slurm) -> list[int]:
    return [pid for node in slurm.layout.nodes for pid in processes_of_jobs(slurm.layout, node)]


@pytest.mark.parametrize("number", range(1, RUNS + 1))
def test_the_demo_survives_a_random_fault_every_20_seconds(slurm, recipe, calm, table, number, tmp_path):
    rng = random.Random(f"{SEED} {number}")
    runs, log = tmp_path / "runs", tmp_path / "driver.txt"
    command = _command(recipe, runs, "--executor", "slurm")
    with log.open("wb") as out:
        driver = subprocess.Popen(["bash", "-c", LOOK_AFTER, "again", *command], stdout=out, stderr=out)
    faults = RandomFaults(slurm, rng, driver, tmp_path / "faults.txt")
    outcome = Outcome(number, faults)
    table.outcomes.append(outcome)
    began = time.monotonic()
    following = began + rng.uniform(0.0, FAULT_EVERY_SECONDS)
    try:
        while driver.poll() is None:
            assert time.monotonic() < began + LONGEST_SECONDS, "it goes on and on"
            if time.monotonic() >= following:
                faults.strike()
                following += FAULT_EVERY_SECONDS
            time.sleep(0.1)
        outcome.seconds, outcome.attempts = time.monotonic() - began, _attempts(runs)
        faults.mend()
        assert driver.returncode == 0
        assert _outputs(runs) == calm[0]
        slurm.until(lambda: not live_jobs(), "an empty queue")
        slurm.until(lambda: not _left_over(slurm), "the end of all that jobs started")
        # What was killed while it wrote has left temporary names; the same command removes them.
        subprocess.run(command, check=True, capture_output=True, timeout=LONGEST_SECONDS)
        assert not list(runs.rglob(f"*{TEMPORARY_MARK}*"))
        outcome.passed = True
    finally:
        if driver.poll() is None:
            subprocess.run(["pkill", "-KILL", "-P", str(driver.pid)], check=False)
            driver.kill()
            driver.wait()
        if not outcome.passed:
            print(f"\n{log.read_text()}\n{faults.log.read_text() if faults.log.exists() else ''}", flush=True)
        print(f"\n{outcome}", flush=True)
