"""The real Slurm of scripts/slurm_sandbox: what jobs see, and what faults do to them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from scripts.slurm_sandbox import services
from scripts.slurm_sandbox.processes import running
from tests.support.cluster_sandbox import SlurmSandbox

pytestmark = pytest.mark.slow

# Says where it runs, and goes on until a file appears: the test decides when a job has finished.
SAY_AND_WAIT = """\
echo "start ${SLURM_RESTART_COUNT:-0}"
srun sh -c 'echo "task on $SLURMD_NODENAME"; until [ -e finish ]; do sleep 0.1; done'
echo "end ${SLURM_RESTART_COUNT:-0}"
"""


def output(folder: Path, job: str) -> list[str]:
    path = folder / f"{job}.out"
    return path.read_text().splitlines() if path.exists() else []


def until_says(slurm: SlurmSandbox, folder: Path, job: str, line: str) -> None:
    slurm.until(lambda: line in output(folder, job), f"'{line}' from job {job}")


def test_gloo_reaches_from_node_to_node(slurm: SlurmSandbox, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "all_reduce.py"
    job = slurm.sbatch(
        tmp_path,
        f"export MASTER_ADDR=$SLURMD_NODENAME MASTER_PORT=29500\nsrun '{sys.executable}' '{script}'\n",
        "--nodes=2",
    )
    slurm.until_state(job, "COMPLETED")
    said = [line for line in output(tmp_path, job) if " has " in line]
    assert sorted(said) == ["n1 has 3", "n2 has 3"]
    assert "COMPLETED" in slurm.slurm("sacct", "--noheader", "--parsable2", f"--jobs={job}", "--format=State")


@pytest.mark.cluster
def test_power_cut_requeues_the_job_on_other_nodes(slurm: SlurmSandbox, tmp_path: Path) -> None:
    job = slurm.sbatch(tmp_path, SAY_AND_WAIT, "--nodes=2")
    until_says(slurm, tmp_path, job, "task on n2")
    slurm.control("power-cut", "n2")
    until_says(slurm, tmp_path, job, "start 1")
    slurm.until_state(job, "RUNNING")
    assert "n2" not in slurm.nodes(job)
    (tmp_path / "finish").touch()
    slurm.until_state(job, "COMPLETED")
    assert "end 0" not in output(tmp_path, job)
    assert slurm.node_state("n2").startswith("DOWN")
    states = slurm.slurm("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", f"--jobs={job}",
                         "--format=State")  # fmt: skip
    assert states.split() == ["NODE_FAIL", "COMPLETED"]


def test_jobs_outlive_their_controller(slurm: SlurmSandbox, tmp_path: Path) -> None:
    job = slurm.sbatch(tmp_path, SAY_AND_WAIT)
    until_says(slurm, tmp_path, job, "task on n1")
    slurm.control("restart-slurmctld")
    assert slurm.state(job) == "RUNNING"
    (tmp_path / "finish").touch()
    slurm.until_state(job, "COMPLETED")
    assert output(tmp_path, job) == ["start 0", "task on n1", "end 0"]


def test_a_controller_that_crashes_is_started_again(slurm: SlurmSandbox) -> None:
    crashed = slurm.controller_crashes()
    controller = running(services.pid_file(slurm.layout, "slurmctld"))
    assert controller is not None
    os.kill(controller, signal.SIGSEGV)
    slurm.until(lambda: slurm.controller_crashes() == crashed + 1, "the controller to come back")
    assert "UP" in slurm.slurm("scontrol", "ping")
    assert running(services.pid_file(slurm.layout, "slurmctld")) not in (None, controller)


def test_preempted_job_is_warned_and_runs_again(slurm: SlurmSandbox, tmp_path: Path) -> None:
    script = """\
trap 'echo asked; exit 0' USR1
echo "start ${SLURM_RESTART_COUNT:-0}"
until [ -e finish ]; do sleep 0.1; done
echo "end ${SLURM_RESTART_COUNT:-0}"
"""
    options = ["--partition=grace", "--nodes=4", "--exclusive", "--signal=B:USR1@30"]
    job = slurm.sbatch(
        tmp_path, script.replace("exit 0", "scontrol requeue $SLURM_JOB_ID; sleep 30"), *options
    )
    until_says(slurm, tmp_path, job, "start 0")
    (tmp_path / "urgent").mkdir()
    urgent = slurm.sbatch(tmp_path / "urgent", "hostname\n", "--partition=urgent", "--nodes=4", "--exclusive")
    slurm.until_state(urgent, "COMPLETED")
    until_says(slurm, tmp_path, job, "start 1")
    (tmp_path / "finish").touch()
    slurm.until_state(job, "COMPLETED")
    assert [line for line in output(tmp_path, job) if "slurmstepd" not in line and line != "Terminated"] == [
        "start 0", "asked", "start 1", "end 1",
    ]  # fmt: skip


def test_what_is_mounted_later_is_on_every_node(slurm: SlurmSandbox, tmp_path: Path) -> None:
    """Tests of full disks mount small ones."""
    place = slurm.layout.shared / "small"
    place.mkdir()
    slurm.slurm("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place))
    try:
        job = slurm.sbatch(
            tmp_path, f"srun sh -c 'echo $SLURMD_NODENAME >{place}/$SLURM_PROCID'\n", "--nodes=4"
        )
        slurm.until_state(job, "COMPLETED")
        assert sorted(path.read_text() for path in place.iterdir()) == ["n1\n", "n2\n", "n3\n", "n4\n"]
    finally:
        slurm.slurm("umount", str(place))
