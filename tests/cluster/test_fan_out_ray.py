"""What only Ray can suffer: its head lost in the middle of a sweep, a node of its allocation, the allocation itself."""

from __future__ import annotations

import json
import shlex
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from durable_files import read_json
from halo_cluster.fan_out import Plan, RayActors
from tests.cluster.test_fan_out import (
    ROOT,
    InBackground,
    expected,
    folder,
    notes,
    published,
    wait_until,
    why_ended,
    workers_find_their_function,
)
from tests.support.cluster_sandbox import SlurmSandbox
from tests.support.fan_out_work import executions, plan_of
from tests.support.fault_table import FaultRow

__all__ = ["folder", "notes", "workers_find_their_function"]
pytestmark = [pytest.mark.timeout(280), pytest.mark.cluster]


def processes_called(name: str) -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if process.name() == name]


def four_soon_and_eight_on_go(notes: Path) -> Plan:
    soon, later = plan_of(notes, 4), plan_of(notes, 12, hold="go")
    return replace(later, tasks=soon.tasks + later.tasks[4:])


def test_head_killed_in_the_middle(folder: Path, notes: Path, fault_table: list[FaultRow]) -> None:
    """A cluster of its own is started anew; results of the first one stay."""
    call = InBackground(folder, four_soon_and_eight_on_go(notes), RayActors(2))
    wait_until(lambda: len(executions(notes)) == 6)
    (token,) = (folder / "workers").glob("*.token")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    (head,) = processes_called("gcs_server")
    listening = [link for link in head.net_connections("inet") if link.status == psutil.CONN_LISTEN]
    assert {link.laddr.ip.removeprefix("::ffff:") for link in listening} == {"127.0.0.1"}
    kept = published(folder)
    since = time.monotonic()
    head.kill()
    wait_until(lambda: len(executions(notes)) == 6 and executions(notes).total() == 8)
    seconds = time.monotonic() - since
    (notes / "go").touch()
    found = call.finished()
    fault_table.append(
        FaultRow("ray: kill -9 of the head", why_ended(folder), 2, seconds, found == expected(12))
    )
    assert found == expected(12)
    assert published(folder).items() >= kept.items()
    assert executions(notes) == {value: 2 if value in (4, 5) else 1 for value in range(12)}
    assert not processes_called("raylet")


def submit(slurm: SlurmSandbox, folder: Path, notes: Path, *options: str) -> str:
    """A job whose first node fans 12 tasks out to a Ray of its own on all its nodes."""
    wish: dict[str, Any] = {
        "folder": str(folder),
        "notes": str(notes),
        "count": 12,
        "arguments": {"hold": "go"},
    }
    wish |= {"backend": "RayActors", "options": {"workers": 3}}
    command = [sys.executable, "-m", "tests.support.fan_out_work", json.dumps(wish)]
    return slurm.sbatch(
        notes.parent, f"cd {ROOT}\n{shlex.join(command)}\n", "--nodes=3", "--cpus-per-task=1", *options
    )


def results(folder: Path) -> dict[str, Any]:
    return {path.stem: read_json(path)["result"] for path in (folder / "results").glob("*.json")}


def test_node_of_the_allocation_loses_power(
    slurm: SlurmSandbox, folder: Path, notes: Path, fault_table: list[FaultRow]
) -> None:
    job = submit(slurm, folder, notes, "--no-kill")
    wait_until(lambda: len(executions(notes)) == 3)
    hosts = {worker["host"] for worker in map(read_json, (folder / "workers").glob("ray-*-[0-9].json"))}
    *_, last = slurm.nodes(job)
    assert hosts == set(slurm.nodes(job)), "a worker on every node"
    since = time.monotonic()
    slurm.control("power-cut", last)
    (notes / "go").touch()  # the other nodes have no CPU left for what the lost one had in hand
    wait_until(lambda: max(executions(notes).values()) == 2)
    seconds = time.monotonic() - since
    slurm.until_state(job, "COMPLETED", seconds=200)
    equal = results(folder) == expected(12)
    fault_table.append(
        FaultRow("ray: power cut of a node of its allocation", why_ended(folder), 2, seconds, equal)
    )
    assert equal
    assert executions(notes).total() == 13


def test_allocation_is_preempted(
    slurm: SlurmSandbox, folder: Path, notes: Path, fault_table: list[FaultRow]
) -> None:
    job = submit(slurm, folder, notes)
    wait_until(lambda: len(executions(notes)) == 3)
    since = time.monotonic()
    slurm.sbatch(notes.parent, "sleep 3\n", "--partition=urgent", "--nodes=4", "--exclusive")
    wait_until(lambda: executions(notes).total() == 6)
    seconds = time.monotonic() - since
    (notes / "go").touch()
    slurm.until_state(job, "COMPLETED", seconds=200)
    equal = results(folder) == expected(12)
    fault_table.append(FaultRow("ray: preemption of its allocation", why_ended(folder), 2, seconds, equal))
    assert equal
    assert executions(notes) == {value: 2 if value in (0, 1, 2) else 1 for value in range(12)}
