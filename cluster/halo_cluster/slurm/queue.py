"""Slurm's commands. Each function makes one call for all jobs."""

from __future__ import annotations

import getpass
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from halo_cluster.jobs import EndedJob, LiveJob, LiveState, SchedulerUnreachable, StageJob
from halo_cluster.record import StageRecord

CALL_TIMEOUT_SECONDS = 60
_SEPARATOR = "|"
_STATES: dict[str, LiveState] = {
    "PENDING": "pending",
    "REQUEUED": "pending",
    "REQUEUE_HOLD": "pending",
    "SUSPENDED": "pending",
    "CONFIGURING": "running",
    "RUNNING": "running",
    "COMPLETING": "ending",
    "STAGE_OUT": "ending",
}


def call(command: Sequence[str]) -> str:
    """Run one of Slurm's commands; returns its stdout. SchedulerUnreachable if it fails, with its last line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"`{command[0]}` is not on PATH; run this where Slurm's commands are, or choose --executor local"
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerUnreachable(f"`{command[0]}` did not answer within {CALL_TIMEOUT_SECONDS} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SchedulerUnreachable(f"`{command[0]}` failed: {said[-1] if said else done.returncode}")
    return done.stdout


def live_jobs() -> dict[str, list[LiveJob]]:
    """This user's jobs in the queue by name, oldest first."""
    form = _SEPARATOR.join(("%A", "%T", "%r", "%N", "%j"))
    found: dict[str, list[LiveJob]] = {}
    words = ["squeue", "--noheader", f"--user={getpass.getuser()}", f"--format={form}"]
    for line in call(words).splitlines():
        job, state, reason, nodes, name = line.split(_SEPARATOR, 4)
        if state in _STATES:
            found.setdefault(name, []).append(LiveJob(job, name, _STATES[state], reason, nodes))
    for jobs in found.values():
        jobs.sort(key=lambda live: int(live.job))
    return found


def ended_jobs(jobs: Iterable[str]) -> dict[str, EndedJob]:
    """How jobs ended, from the accounting; empty at a site without accounting."""
    wanted = ",".join(sorted(set(jobs)))
    if not wanted:
        return {}
    try:
        form = "--format=JobIDRaw,State,NodeList"
        lines = call(["sacct", "-X", "--noheader", "--parsable2", f"--jobs={wanted}", form])
    except (SchedulerUnreachable, ValueError):
        return {}
    rows = (line.split(_SEPARATOR) for line in lines.splitlines())
    return {job: EndedJob(job, state.split()[0], nodes) for job, state, nodes in rows}


def cancel(jobs: Sequence[str]) -> None:
    if jobs:
        call(["scancel", *jobs])


def start_now(jobs: Sequence[str]) -> None:
    """Start requeued jobs, which Slurm would delay by two minutes."""
    if jobs:
        call(["scontrol", "update", f"JobId={','.join(jobs)}", "StartTime=now"])


def release(jobs: Sequence[str]) -> None:
    """Release jobs that Slurm holds because a node could not start them."""
    if jobs:
        call(["scontrol", "release", ",".join(jobs)])


def cancel_run(run_folder: Path, stage: str | None) -> list[str]:
    """Cancel the jobs of a run, or of one of its stages, that Slurm has in its queue; returns their ids."""
    live = live_jobs()
    records = (StageRecord(folder) for folder in run_folder.glob("*/*") if (folder / "jobs").is_dir())
    names = [StageJob(record.stage, record, {}).job_name for record in records if stage in (None, record.stage)]
    jobs = [entry.job for name in names for entry in live.get(name, [])]
    cancel(jobs)
    return jobs
