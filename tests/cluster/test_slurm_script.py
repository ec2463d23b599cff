"""The batch script of a stage, without a Slurm: what is asked for, and that nothing of a recipe becomes a command."""

import shlex
import subprocess
import sys

import pytest

from halo_cluster import Nodes
from halo_cluster.jobs import StageJob
from halo_cluster.record import StageRecord
from halo_cluster.slurm import Slurm, SlurmSettings, queue
from halo_cluster.slurm.job import SlurmJob


@pytest.fixture
def slurm_on_path(tmp_path, monkeypatch):
    """Commands of that name, which say what the test has them say."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    put("srun", "exit 1")
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return put


@pytest.fixture
def job(tmp_path) -> StageJob:
    record = StageRecord(tmp_path / "runs" / "mine" / "align" / "0123456789ab")
    return StageJob("align", record, {"stage": "align"}, processes=8)


def flags(script: str) -> dict[str, str]:
    words = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (word.removeprefix("--").partition("=") for word in words)}


def test_a_script_asks_for_what_the_recipe_says(slurm_on_path, job):
    settings = SlurmSettings(
        nodes=2, gpus_per_node=4, time_minutes=90, grace_seconds=300, memory_gb=64, partition="gpu", account="lab",
        qos="long", constraint="h200", container="/images/halo.sqsh", sbatch={"mail-user": "ada@lab"},
    )  # fmt: skip
    script = Slurm(settings, ("-m", "stage")).preview(job)
    asked = flags(script)
    wanted = {
        "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "4", "time": "90", "signal": "USR2@300",
        "mem": "65536M", "partition": "gpu", "account": "lab", "qos": "long", "constraint": "h200",
        "mail-user": "ada@lab", "job-name": job.job_name, "dependency": "singleton", "kill-on-invalid-dep": "yes",
    }  # fmt: skip
    assert {name: asked.get(name) for name in wanted} == wanted
    assert "requeue" in asked
    assert "--container-image=/images/halo.sqsh" in script
    assert not job.jobs_folder.exists(), "a preview writes nothing"


def test_the_preview_is_the_script_that_is_submitted(slurm_on_path, job, tmp_path):
    """The preview calls two private methods of Submitit's; this fails when they change."""
    slurm_on_path("sbatch", f"cp $1 {tmp_path}/submitted.sh; echo Submitted batch job 12")
    slurm = Slurm(SlurmSettings(nodes=2, partition="gpu"), ("-m", "stage"))
    preview = slurm.preview(job)
    assert slurm.submit(job) == "12"
    assert preview == (tmp_path / "submitted.sh").read_text()
    assert "srun" in preview and "submitit.core._submit" in preview


def test_a_job_becomes_the_stage(tmp_path):
    """Submitit calls this in the job; no process of Submitit's is left to pass signals on."""
    program = "import os, sys; print(os.getpid(), sys.argv[1:])"
    code = f"""
import os
from halo_cluster.slurm.job import become_python
print(os.getpid(), flush=True)
become_python("-c", {program!r}, "work.json")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()
    assert after == f"{before} ['work.json']"


def slurm_job(node: int = 0, restart: int = 0) -> SlurmJob:
    return SlurmJob("17", restart, Nodes(2, node, "n1"))


@pytest.mark.parametrize(
    ("code", "asked", "node", "restart", "requeued", "expected"),
    [
        (0, False, 0, 0, False, 0),
        (75, True, 0, 0, True, 0),  # saved, before a time limit or preemption
        (130, True, 0, 5, True, 0),  # a stage that does not train
        (1, True, 0, 5, True, 0),  # asked before it could save
        (2, True, 0, 0, False, 2),  # a user error stays one
        (75, False, 0, 0, False, 75),  # stopped by the file: the user starts it again
        (1, False, 0, 1, True, 0),  # a retry that is left
        (1, False, 0, 2, False, 1),
        (75, True, 1, 0, False, 0),  # only the first node requeues
        (75, False, 1, 0, False, 0),
        (1, False, 1, 0, False, 1),
    ],
)
def test_when_a_job_is_requeued(monkeypatch, code, asked, node, restart, requeued, expected):
    calls = []

    def call(command):
        calls.append(command)
        return "JobState=RUNNING"

    monkeypatch.setattr("halo_cluster.slurm.job.call", call)
    monkeypatch.setattr("halo_cluster.signals.wait_for", lambda number, seconds: None)
    monkeypatch.setattr("halo_cluster.signals._stop_requested", asked)
    assert slurm_job(node, restart).exit_code(code, retries=2) == expected
    assert (["scontrol", "requeue", "17"] in calls) == requeued


def test_a_job_that_slurm_is_ending_is_not_requeued(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "halo_cluster.slurm.job.call", lambda command: calls.append(command) or "JobState=CANCELLED"
    )
    monkeypatch.setattr("halo_cluster.signals._stop_requested", True)
    assert slurm_job().exit_code(75, retries=0) == 0
    assert calls == [["scontrol", "show", "job", "17"]]


def test_a_stage_that_does_not_train_gets_one_node(slurm_on_path, job):
    single = StageJob("select", job.record, {}, processes=1)
    assert flags(Slurm(SlurmSettings(nodes=4), ("-m", "stage")).preview(single))["nodes"] == "1"


@pytest.mark.parametrize(
    "settings",
    [
        SlurmSettings(partition="a\nrm -rf ~"),
        SlurmSettings(container="x\nrm -rf ~"),
        SlurmSettings(sbatch={"mail-user": "a\nrm -rf ~"}),
        SlurmSettings(sbatch={"mail user": "a"}),
        SlurmSettings(sbatch={"dependency": "after:1"}),
    ],
)
def test_what_would_become_another_line_or_flag_is_refused(slurm_on_path, job, settings):
    with pytest.raises(ValueError, match=r"correct it|remove it"):
        Slurm(settings, ("-m", "stage")).preview(job)


def test_odd_values_stay_values(slurm_on_path, job, tmp_path):
    settings = SlurmSettings(partition="$(touch hacked)", sbatch={"comment": "`touch hacked`; 'quoted'"})
    asked = flags(Slurm(settings, ("-m", "stage")).preview(job))
    assert asked["partition"] == "$(touch hacked)"
    assert asked["comment"] == "`touch hacked`; 'quoted'"


def test_a_refusal_is_told_in_slurms_words(slurm_on_path, job):
    slurm_on_path("sbatch", "echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1")
    with pytest.raises(
        ValueError, match="invalid partition specified: gpuu; correct the recipe's cluster section"
    ):
        Slurm(SlurmSettings(partition="gpuu"), ("-m", "stage")).submit(job)


def test_a_controller_that_is_away_is_no_refusal(slurm_on_path, job):
    slurm_on_path(
        "sbatch", "echo 'sbatch: error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    )
    with pytest.raises(RuntimeError, match="Unable to contact slurm controller"):
        Slurm(SlurmSettings(), ("-m", "stage")).submit(job)


def test_the_queue_is_read_in_one_call(slurm_on_path):
    slurm_on_path(
        "squeue", "echo '12|PENDING|BeginTime||halo.a.align.1'; echo '9|RUNNING|None|n[1-2]|halo.a.align.1'"
    )
    (jobs,) = queue.live_jobs().values()
    assert [(job.job, job.state, job.reason, job.nodes) for job in jobs] == [
        ("9", "running", "None", "n[1-2]"),
        ("12", "pending", "BeginTime", ""),
    ]


def test_a_site_without_accounting_has_no_word_on_ended_jobs(slurm_on_path):
    slurm_on_path("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert queue.ended_jobs(["12"]) == {}


def test_without_slurm_the_fix_is_named(monkeypatch, tmp_path, job):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="choose --executor local"):
        queue.live_jobs()
    with pytest.raises(ValueError, match="srun"):
        Slurm(SlurmSettings(), ("-m", "stage")).preview(job)
