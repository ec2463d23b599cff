"""Fixtures shared by every room's tests."""

import atexit
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Tests are many small processes: threads of their own would only take the cores from each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach a hub; every model and tokenizer is made or shipped here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.support.cluster_sandbox import SlurmSandbox, hold_slurm_sandbox
from tests.support.fault_table import PROPERTY, FaultRow, markdown

# Without a GPU the Triton kernels run in Triton's interpreter; it has to be said before a kernel is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
# trust_remote_code copies modelling code to a folder of the user's. Here it is one fresh folder for the whole session:
# Python imports the package `transformers_modules` once, so a second folder would not be looked at.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="halo-tests-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


# With two processes a long file that begins last is waited for alone.
LONGEST_FILES = (
    "test_slurm_runs.py",
    "test_sweep_backends.py",
    "test_worker.py",
    "test_resume_layouts.py",
    "test_fan_out.py",
    "test_parallel_training.py",
    "test_conversion_faults.py",
    "test_cli.py",
    "test_pipeline.py",
    "test_shipped_recipes.py",
    "test_watching.py",
    "test_benchmarks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others in their order."""
    rank = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture
def mounted_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Gives a folder on a file system of its own, as large as asked for ("1200k")."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False)
        if mounted.returncode != 0:
            assert os.environ.get("CI") != "true", (
                "CI runs this test as root, and root could not mount a tmpfs"
            )
            pytest.skip("this root may not mount a tmpfs")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def held_slurm(request: pytest.FixtureRequest) -> Iterator[SlurmSandbox]:
    yield from hold_slurm_sandbox(request)


@pytest.fixture
def slurm(held_slurm: SlurmSandbox) -> Iterator[SlurmSandbox]:
    """A real Slurm with nodes n1 to n4, all idle; one for the whole session."""
    held_slurm.heal()
    yield held_slurm


@pytest.fixture
def fault_table(request: pytest.FixtureRequest) -> Iterator[list[FaultRow]]:
    """Rows put here are printed at the end of the session."""
    rows: list[FaultRow] = []
    yield rows
    request.node.user_properties += [(PROPERTY, row.cells()) for row in rows]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found]
    rows = [
        cells
        for report in reports
        if getattr(report, "when", None) == "teardown"
        for name, cells in report.user_properties
        if name == PROPERTY
    ]
    if rows:
        terminalreporter.section("faults survived")
        for line in markdown(rows):
            terminalreporter.line(line)
