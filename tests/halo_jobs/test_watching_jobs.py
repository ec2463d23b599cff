"""Looking at runs whose stages wait in a queue, restart, or were on a node that is gone."""

import json
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from durable_files import read_json
from halo_cluster import RunFolder, StageRecord
from halo_cluster.jobs import StageJob
from halo_reports.monitoring.exporter import exposition
from halo_reports.monitoring.readings import read_run
from halo_training.progress import ProgressReporter
from tests.support.halo import halo, halo_command


def test_logs_follow_across_attempts_until_done(tmp_path):
    RunFolder(tmp_path).write_plan("name: small\n", {"align": "0123456789ab"})
    record = StageRecord(tmp_path / "align" / "0123456789ab")
    for number in (1, 2):
        record.begin_attempt().log(f"work of attempt {number}")
    first, second = record.folder / "attempt.1", record.folder / "attempt.2"
    follower = subprocess.Popen(
        halo_command("logs", tmp_path, "align", "--follow"), stdout=subprocess.PIPE, text=True
    )
    assert follower.stdout is not None
    lines = iter(follower.stdout.readline, "")
    assert next(lines).endswith("attempt 2 on " + socket.gethostname() + ": log.txt\n")
    assert next(lines).endswith(" work of attempt 2\n")
    with open(second / "rank-1.txt", "w") as rank:
        rank.write("half of a ")
        rank.flush()
        time.sleep(0.8)
        rank.write("line\nand what follows no line end")
    third = record.begin_attempt()  # the second is closed as killed
    third.log("work of attempt 3")
    output = record.folder / "weights"
    output.write_text("weights")
    third.publish([output], {})
    rest = [line.rstrip("\n") for line in lines]
    assert follower.wait(20) == 0
    assert rest[0].endswith("attempt 2 on " + socket.gethostname() + ": rank-1.txt")
    assert rest[1:4] == [
        "half of a line",
        "and what follows no line end",
        "== attempt 2 interrupted: killed, or the machine stopped",
    ]
    assert rest[4].endswith("attempt 3 on " + socket.gethostname() + ": log.txt")
    assert rest[5].endswith(" work of attempt 3") and rest[6] == "== align done"
    assert not any("attempt 1" in line for line in rest), first


@pytest.fixture
def submitted_run(tmp_path) -> Path:
    """A run whose align was submitted twice and never began."""
    RunFolder(tmp_path).write_plan("name: small\nalign: {steps: 10}\n", {"align": "0123456789ab"})
    jobs = tmp_path / "align" / "0123456789ab" / "jobs"
    jobs.mkdir(parents=True)
    for job in (9, 12):
        (jobs / f"{job}.json").write_text(json.dumps({"job": str(job), "name": "halo", "submitted": ""}))
        (jobs / f"{job}_0_log.out").write_text(f"job {job}: python: not found\n")
    (jobs / "work.0123456789ab.json").write_text("{}")
    return tmp_path


def test_job_that_began_no_attempt(submitted_run):
    shown = halo("logs", submitted_run, "align")
    assert shown.stdout.splitlines() == [
        "== the scheduler's log: 12_0_log.out",
        "job 12: python: not found",
    ]
    (stage,) = read_run(submitted_run)
    assert (stage.state, stage.job, stage.attempts, stage.steps) == ("pending", "12", 0, 10)
    content = exposition(submitted_run)
    assert re.search(r'halo_stage_state\{.*stage="align",state="pending"\} 1.0', content)
    assert re.search(r'halo_restarts_total\{.*stage="align"\} 0.0', content)


def test_status_asks_slurm_why_a_stage_waits(submitted_run, tmp_path_factory, monkeypatch):
    record = StageRecord(submitted_run / "align" / "0123456789ab")
    programs = tmp_path_factory.mktemp("bin")
    name = StageJob("align", record, {}).job_name
    squeue = programs / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '12|PENDING|Resources||{name}'\necho '13|RUNNING|None|n1|other'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    shown = halo("status", submitted_run)
    assert shown.stdout.splitlines()[-1] == "align is job 12, pending (Resources)"
    stage = json.loads(halo("status", submitted_run, "--json").stdout)["stages"][0]
    assert (stage["state"], stage["queue"]["reason"]) == ("pending", "Resources")
    squeue.write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n"
    )
    away = halo("status", submitted_run)
    assert away.returncode == 0 and "pending" in away.stdout
    assert "Unable to contact slurm controller; showing what the run's folder says" in away.stderr


def test_status_of_a_stage_on_a_node_that_is_gone(submitted_run):
    attempt = submitted_run / "align" / "0123456789ab" / "attempt.12.0"
    attempt.mkdir()
    begun = {"host": "node7", "pid": 5, "birth": "x", "started": "2026-01-01T00:00:00+00:00"}
    (attempt / "started.json").write_text(json.dumps(begun))
    (attempt / "heartbeat").write_text("         90.000\n")
    assert "last heartbeat" not in halo("status", submitted_run).stdout
    long_ago = time.time() - 600
    os.utime(attempt / "heartbeat", (long_ago, long_ago))
    shown = halo("status", submitted_run).stdout
    assert re.search(r"align +running", shown)
    assert re.search(r"align sent its last heartbeat 10 min 0\d s ago; node7 may be down, or the disk slow", shown)


def test_tasks_of_an_earlier_attempt_count_as_done_and_not_as_speed(tmp_path, monkeypatch):
    """Nine were there, the tenth takes forty seconds: ten more such are left."""
    now = 100.0
    monkeypatch.setattr("halo_training.progress.time.monotonic", lambda: now)
    reporter = ProgressReporter("select", 20, Console(quiet=True), tmp_path)
    assert read_json(tmp_path / "progress.json")["done"] == 0
    for done in range(1, 10):
        reporter.update(done, "kept")
    assert read_json(tmp_path / "progress.json")["done"] == 9
    now = 140.0
    reporter.update(10, "new")
    expected = {"title": "select", "done": 10, "total": 20, "seconds_left": 400.0}
    assert read_json(tmp_path / "progress.json") == expected
    now = 1000.0
    reporter.update(20, "last")
    assert read_json(tmp_path / "progress.json")["seconds_left"] == 0.0
