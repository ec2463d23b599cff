"""One contract for every backend that tasks are fanned out to, each on the real thing, with real kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from durable_files import read_json
from halo_cluster.fan_out import (
    Backend,
    FanOutFailed,
    LocalProcesses,
    Plan,
    RayActors,
    SlurmArray,
    Task,
    ThisProcess,
    fan_out,
)
from halo_cluster.fan_out.ray_cluster import RayCluster, wait_for_address
from tests.support.fan_out_work import WORKER, executions, plan_of
from tests.support.fault_table import FaultRow

ROOT = Path(__file__).parents[2]
NAME = "tiny select"
# Starting Ray, joining it and scheduling actors takes its time on a machine that does other things too.
pytestmark = pytest.mark.timeout(280)

everywhere = pytest.mark.parametrize("site", ["local", "ray", "slurm-array"], indirect=True)
everywhere_in_time = pytest.mark.parametrize(
    "site",
    ["local", *(pytest.param(name, marks=pytest.mark.cluster) for name in ("ray", "slurm-array"))],
    indirect=True,
)


@pytest.fixture(autouse=True)
def workers_find_their_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        cluster = RayCluster(tmp_path_factory.mktemp("ray"), "shared", cpus=8)
    yield cluster
    cluster.end()


@dataclass(frozen=True)
class Site:
    """A backend of four workers, and how the driver of another process makes the same."""

    name: str
    backend: Backend
    options: dict[str, Any]

    def drive(self, folder: Path, notes: Path, count: int, **arguments: Any) -> subprocess.Popen[str]:
        wish = {
            "folder": str(folder),
            "notes": str(notes),
            "count": count,
            "arguments": arguments,
            "backend": type(self.backend).__name__,
            "options": self.options,
        }
        command = [sys.executable, "-m", "tests.support.fan_out_work", json.dumps(wish)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def site(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Site:
    options: dict[str, Any] = {"workers": 4}
    if request.param == "local":
        return Site("local", LocalProcesses(**options), options)
    if request.param == "slurm-array":
        request.getfixturevalue("slurm")
        return Site("slurm-array", SlurmArray(**options), options)
    cluster = request.getfixturevalue("ray_cluster")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, cluster.environment[name])
    options["address"] = wait_for_address(cluster.address_file)
    return Site("ray", RayActors(**options), options)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes"
    path.mkdir()
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "fan out"


def wait_until(condition: Callable[[], Any], seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class InBackground(threading.Thread):
    """A fan-out that the test does something to meanwhile."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(daemon=True)
        self._call = arguments, options
        self.results: dict[str, Any] | None = None
        self.start()

    def run(self) -> None:
        arguments, options = self._call
        self.results = fan_out(*arguments, name=NAME, **options)

    def finished(self) -> dict[str, Any] | None:
        self.join(200)
        assert not self.is_alive(), "the call has not returned"
        return self.results


def expected(count: int) -> dict[str, Any]:
    return {f"task-{value}": {"square": value**2, "third": value / 3} for value in range(count)}


def published(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "results").glob("*.json")}


def why_ended(folder: Path) -> str:
    """What is on record of the workers that did not leave by themselves."""
    reasons = {read_json(path)["reason"] for path in (folder / "workers").glob("*.ended.json")}
    return "; ".join(sorted(reasons - {"it left"}))


@everywhere
def test_every_task_once(site: Site, folder: Path, notes: Path) -> None:
    told: list[tuple[int, str]] = []
    plan = plan_of(notes, 12, seconds=0.05)
    found = fan_out(folder, plan, site.backend, name=NAME, progress=lambda *news: told.append(news))
    assert found == expected(12)
    assert executions(notes) == dict.fromkeys(range(12), 1)
    assert [number for number, _ in told] == list(range(1, 13))
    assert {task for _, task in told} == {task.name for task in plan.tasks}
    # Once more: everything is there already, also for another backend.
    assert fan_out(folder, plan, ThisProcess(), name=NAME) == found
    assert executions(notes).total() == 12


@everywhere
def test_half_the_workers_killed_with_tasks_in_hand(
    site: Site, folder: Path, notes: Path, fault_table: list[FaultRow]
) -> None:
    call = InBackground(folder, plan_of(notes, 10, hold="go"), site.backend)
    wait_until(lambda: len(executions(notes)) == 4)
    victims = sorted(executions(notes))[:2]
    since = time.monotonic()
    for value in victims:
        (notes / f"die-{value}").touch()
    wait_until(lambda: executions(notes).total() == 6)
    seconds = time.monotonic() - since
    (notes / "go").touch()
    found = call.finished()
    fault = f"{site.name}: kill -9 of two of four workers"
    fault_table.append(FaultRow(fault, why_ended(folder), 2, seconds, found == expected(10)))
    assert found == expected(10)
    assert executions(notes) == {value: 2 if value in victims else 1 for value in range(10)}


@everywhere_in_time
def test_killed_driver_goes_on_where_it_was(site: Site, folder: Path, notes: Path) -> None:
    driver = site.drive(folder, notes, 10, seconds=0.3)
    wait_until(lambda: len(published(folder)) >= 3)
    driver.kill()
    driver.communicate()
    kept = published(folder)
    assert fan_out(folder, plan_of(notes, 10, seconds=0.3), site.backend, name=NAME) == expected(10)
    assert published(folder).items() >= kept.items()
    times = executions(notes)
    assert [times[int(name.removeprefix("task-").removesuffix(".json"))] for name in kept] == [1] * len(kept)


@everywhere_in_time
def test_two_drivers_at_once(site: Site, folder: Path, notes: Path) -> None:
    drivers = [site.drive(folder, notes, 16, seconds=0.1) for _ in range(2)]
    printed = [driver.communicate()[0] for driver in drivers]
    assert [json.loads(text) for text in printed] == [expected(16)] * 2
    assert executions(notes) == dict.fromkeys(range(16), 1)


@everywhere_in_time
def test_task_that_fails_is_tried_again_and_named(site: Site, folder: Path, notes: Path) -> None:
    good, *_ = plan_of(notes, 1).tasks
    lucky_at_last = Task("lucky", {"value": 1, "failures": 2})
    hopeless = Task("hopeless", {"value": 2, "failures": 3})
    plan = Plan(WORKER, {"notes": str(notes)}, (good, lucky_at_last, hopeless))
    with pytest.raises(FanOutFailed) as failure:
        fan_out(folder, plan, site.backend, name=NAME)
    path = folder / "tries" / "hopeless@3.failed.json"
    sentence = f"task hopeless failed 3 times, the last time with: no luck with 2; the traceback is in {path}"
    assert str(failure.value) == sentence
    assert "RuntimeError: no luck with 2" in read_json(path)["traceback"]
    assert executions(notes)[2] == 3
    # The next call gives it three more tries, and computes nothing else again.
    assert fan_out(folder, plan, site.backend, name=NAME)["hopeless"]["square"] == 4
    assert executions(notes) == {0: 1, 1: 3, 2: 4}


@everywhere_in_time
def test_error_of_the_user_is_not_tried_again(site: Site, folder: Path, notes: Path) -> None:
    sentence = "corpus.txt holds no text; give another file"
    plan = Plan(WORKER, {"notes": str(notes)}, (Task("bad", {"value": 5, "refuse": sentence}),))
    with pytest.raises(ValueError) as refusal:
        fan_out(folder, plan, site.backend, name=NAME)
    assert str(refusal.value) == sentence
    assert executions(notes) == {5: 1}


@everywhere_in_time
def test_worker_that_cannot_be_made(site: Site, folder: Path, notes: Path) -> None:
    plan = Plan(WORKER, {"refuse": "no such model; give another path"}, (Task("one", {"value": 1}),))
    with pytest.raises(ValueError, match="no such model; give another path"):
        fan_out(folder, plan, site.backend, name=NAME)
    plan = Plan(WORKER, {"notes": str(notes / "absent" / "deep")}, (Task("one", {"value": 1}),))
    with pytest.raises(FanOutFailed, match=r"no worker could be set up: .*No such file"):
        fan_out(folder, plan, site.backend, name=NAME)
