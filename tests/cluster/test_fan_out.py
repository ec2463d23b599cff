"""One contract for every backend that tasks are fanned out to, on the real thing.

Real kills: of workers with a task in hand, of half of them, of the driver.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
    Task,
    ThisProcess,
    fan_out,
)
from halo_cluster.fan_out.ray_cluster import RayCluster
from tests.cluster.fan_out_work import WORKER, executions, plan_of

ROOT = Path(__file__).parents[2]
SQUARES = {"task-3": {"square": 9, "third": 1.0}}
# Starting Ray, joining it and scheduling actors takes its time on a machine that does other things too.
pytestmark = pytest.mark.timeout(280)


@pytest.fixture(autouse=True)
def workers_find_their_function(monkeypatch: pytest.MonkeyPatch) -> None:
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", python_path)


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        cluster = RayCluster(tmp_path_factory.mktemp("ray"), "shared", cpus=8)
    yield cluster
    cluster.end()


@dataclass(frozen=True)
class Site:
    """A backend of four workers, and how the driver of another process makes the same."""

    backend: Backend

    @property
    def wish(self) -> dict[str, Any]:
        return {"backend": type(self.backend).__name__, "options": asdict(self.backend)}  # type: ignore[call-overload]


everywhere = pytest.mark.parametrize("site", ["local", "ray"], indirect=True)
everywhere_in_time = pytest.mark.parametrize(
    "site", ["local", pytest.param("ray", marks=pytest.mark.cluster)], indirect=True
)


@pytest.fixture
def site(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Site:
    if request.param == "local":
        return Site(LocalProcesses(4))
    cluster = request.getfixturevalue("ray_cluster")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, cluster.environment[name])
    return Site(RayActors(4, cluster.address))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes"
    path.mkdir()
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "fan out"


def wait_until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def started(notes: Path) -> dict[int, list[int]]:
    """Processes by the value of the task that they began, one for each time."""
    values = {int(path.name.partition(".")[0]) for path in notes.glob("*.*") if path.suffix != ".writing"}
    return {value: executions(notes, value) for value in sorted(values)}


class InBackground(threading.Thread):
    """A fan-out that the test does something to meanwhile."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(daemon=True)
        self._call = arguments, options
        self.start()

    def run(self) -> None:
        arguments, options = self._call
        self.results = fan_out(*arguments, name="tiny select", **options)

    def finished(self) -> dict[str, Any]:
        self.join(200)
        assert not self.is_alive()
        return self.results


def expected(count: int) -> dict[str, Any]:
    return {f"task-{value}": {"square": value**2, "third": value / 3} for value in range(count)}


@everywhere
def test_every_task_once(site: Site, folder: Path, notes: Path) -> None:
    told: list[tuple[int, str]] = []
    plan = plan_of(notes, 12, seconds=0.05)
    found = fan_out(folder, plan, site.backend, name="tiny select", progress=lambda *news: told.append(news))
    assert found == expected(12)
    assert [len(processes) for processes in started(notes).values()] == [1] * 12
    assert [number for number, _ in told] == list(range(1, 13))
    assert {task for _, task in told} == {task.name for task in plan.tasks}
    # Once more: everything is there already, also for another backend.
    assert fan_out(folder, plan, ThisProcess(), name="tiny select") == found
    assert sum(len(processes) for processes in started(notes).values()) == 12


@everywhere
def test_half_the_workers_killed_with_tasks_in_hand(site: Site, folder: Path, notes: Path) -> None:
    call = InBackground(folder, plan_of(notes, 10, hold="go"), site.backend)
    wait_until(lambda: len(started(notes)) == 4)
    victims = dict(list(started(notes).items())[:2])
    for (process,) in victims.values():
        os.kill(process, signal.SIGKILL)
    wait_until(lambda: sum(len(processes) for processes in started(notes).values()) == 6)
    (notes / "go").touch()
    assert call.finished() == expected(10)
    times = {value: len(processes) for value, processes in started(notes).items()}
    assert times == {value: 2 if value in victims else 1 for value in range(10)}


@everywhere_in_time
def test_killed_driver_goes_on_where_it_was(site: Site, folder: Path, notes: Path) -> None:
    wish = {
        "folder": str(folder),
        "notes": str(notes),
        "count": 10,
        "arguments": {"seconds": 0.3},
        **site.wish,
    }
    command = [sys.executable, "-m", "tests.cluster.fan_out_work", json.dumps(wish)]
    driver = subprocess.Popen(command, cwd=ROOT)
    wait_until(lambda: len(list((folder / "results").glob("*.json"))) >= 3)
    driver.kill()
    driver.wait()
    kept = {path.name: path.read_bytes() for path in (folder / "results").glob("*.json")}
    assert fan_out(folder, plan_of(notes, 10, seconds=0.3), site.backend, name="tiny select") == expected(10)
    for name, content in kept.items():
        assert (folder / "results" / name).read_bytes() == content
        assert len(started(notes)[int(name.removeprefix("task-").removesuffix(".json"))]) == 1


@everywhere_in_time
def test_two_drivers_at_once(site: Site, folder: Path, notes: Path) -> None:
    wish = {
        "folder": str(folder),
        "notes": str(notes),
        "count": 16,
        "arguments": {"seconds": 0.1},
        **site.wish,
    }
    command = [sys.executable, "-m", "tests.cluster.fan_out_work", json.dumps(wish)]
    drivers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    printed = [driver.communicate()[0] for driver in drivers]
    assert [json.loads(text) for text in printed] == [expected(16)] * 2
    assert [len(processes) for processes in started(notes).values()] == [1] * 16


@everywhere_in_time
def test_task_that_fails_is_tried_again_and_named(site: Site, folder: Path, notes: Path) -> None:
    good, *_ = plan_of(notes, 1).tasks
    lucky_at_last = Task("lucky", {"value": 1, "failures": 2})
    hopeless = Task("hopeless", {"value": 2, "failures": 3})
    plan = Plan(WORKER, {"notes": str(notes)}, (good, lucky_at_last, hopeless))
    with pytest.raises(FanOutFailed) as failure:
        fan_out(folder, plan, site.backend, name="tiny select")
    path = folder / "tries" / "hopeless@3.failed.json"
    sentence = f"task hopeless failed 3 times, at last with: no luck with 2; the traceback is in {path}"
    assert str(failure.value) == sentence
    assert "RuntimeError: no luck with 2" in read_json(path)["traceback"]
    # The mended task is all that the next call computes.
    before = {value: len(processes) for value, processes in started(notes).items()}
    found = fan_out(folder, plan, site.backend, name="tiny select")
    assert found["hopeless"]["square"] == 4
    after = {value: len(processes) for value, processes in started(notes).items()}
    assert before[2] == 3
    assert after == {0: 1, 1: 3, 2: 4}


@everywhere_in_time
def test_error_of_the_user_is_not_tried_again(site: Site, folder: Path, notes: Path) -> None:
    sentence = "corpus.txt holds no text; give another file"
    plan = Plan(WORKER, {"notes": str(notes)}, (Task("bad", {"value": 5, "refuse": sentence}),))
    with pytest.raises(ValueError) as refusal:
        fan_out(folder, plan, site.backend, name="tiny select")
    assert str(refusal.value) == sentence
    assert len(started(notes)[5]) == 1


@everywhere_in_time
def test_worker_that_cannot_be_made(site: Site, folder: Path, notes: Path) -> None:
    plan = Plan(WORKER, {"refuse": "no such model; give another path"}, (Task("one", {"value": 1}),))
    with pytest.raises(ValueError, match="no such model; give another path"):
        fan_out(folder, plan, site.backend, name="tiny select")
    plan = Plan(WORKER, {"notes": str(notes / "absent" / "deep")}, (Task("one", {"value": 1}),))
    with pytest.raises(FanOutFailed, match=r"no worker could be made: .*No such file"):
        fan_out(folder, plan, site.backend, name="tiny select")
