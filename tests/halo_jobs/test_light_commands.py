"""Commands that only look or signal import neither torch nor Megatron."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Runs a command of halo in this interpreter, and says on the last line what it imported.
PROBE = """
import atexit, json, os, sys
heavy = ("torch", "megatron", "transformers", "triton", "ray", "submitit")
atexit.register(lambda: print(json.dumps([name for name in heavy if name in sys.modules])))
sys.argv = ["halo", *sys.argv[1:]]
from halo_jobs.cli import main
main()
"""


def imported(*words: str | Path) -> list[str]:
    command = [sys.executable, "-c", PROBE, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0 or words[0] == "cancel", done.stderr  # which fails where there is no Slurm
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one stage that was begun."""
    attempt = tmp_path / "runs" / "tiny" / "align" / "0123456789ab" / "attempt.1"
    attempt.mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "recipe.yaml").write_text("name: tiny\n")
    (tmp_path / "runs" / "tiny" / "plan.json").write_text('{"align": "0123456789ab"}')
    (attempt / "log.txt").write_text("begun\n")
    return tmp_path / "runs" / "tiny"


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_no_tensors(option):
    assert imported(option) == []


@pytest.mark.parametrize(
    ("command", "options"),
    [("status", []), ("logs", ["align"]), ("metrics", ["--once"]), ("gc", []), ("cancel", [])],
)
def test_a_command_that_looks_or_signals_loads_no_tensors(run, command, options):
    assert imported(command, run, *options) == []
