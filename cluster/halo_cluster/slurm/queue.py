"""Slurm's commands, called with lists of words and read line by line; one call for all jobs."""

from __future__ import annotations

import getpass
import subprocess
from collections.abc import Iterable, Sequence

from halo_cluster.jobs import EndedJob, LiveJob, LiveState, SchedulerUnreachable

PATIENCE_SECONDS = 60
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
    """Run one of Slurm's commands; its stdout. SchedulerUnreachable with what it said otherwise."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"`{command[0]}` is not on PATH; run this where Slurm's commands are, or choose --executor local"
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerUnreachable(f"`{command[0]}` gave no answer in {PATIENCE_SECONDS} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SchedulerUnreachable(f"`{command[0]}` failed: {said[-1] if said else done.returncode}")
    return done.stdout


def live_jobs() -> dict[str, list[LiveJob]]:
    """This user's jobs in the queue by name, oldest first."""
    form = _SEPARATOR.join(("%A", "%T", "%r", "%N", "%j"))
    found: dict[str, list[LiveJob]] = {}
    for line in call(
        ["squeue", "--noheader", f"--user={getpass.getuser()}", f"--format={form}"]
    ).splitlines():
        job, state, reason, nodes, name = line.split(_SEPARATOR, 4)
        if state in _STATES:
            found.setdefault(name, []).append(LiveJob(job, name, _STATES[state], reason, nodes))
    for jobs in found.values():
        jobs.sort(key=lambda live: int(live.job))
    return found


def ended_jobs(jobs: Iterable[str]) -> dict[str, EndedJob]:
    """How jobs ended, from the accounting; empty where a site keeps none."""
    wanted = ",".join(sorted(set(jobs)))
    if not wanted:
        return {}
    try:
        lines = call(
            [
                "sacct",
                "-X",
                "--noheader",
                "--parsable2",
                f"--jobs={wanted}",
                "--format=JobIDRaw,State,NodeList",
            ]
        )
    except (SchedulerUnreachable, ValueError):
        return {}
    rows = (line.split(_SEPARATOR) for line in lines.splitlines())
    return {job: EndedJob(job, state.split()[0], nodes) for job, state, nodes in rows}


def cancel(jobs: Sequence[str]) -> None:
    if jobs:
        call(["scancel", *jobs])


def start_now(jobs: Sequence[str]) -> None:
    """Slurm holds a requeued job back for two minutes; its owner may lift that."""
    if jobs:
        call(["scontrol", "update", f"JobId={','.join(jobs)}", "StartTime=now"])


def release(jobs: Sequence[str]) -> None:
    """Slurm holds a job that a node would not begin; its owner may let it go."""
    if jobs:
        call(["scontrol", "release", ",".join(jobs)])
