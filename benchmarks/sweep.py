"""Measures a sweep of 37 evaluations on four workers, for every backend: utilisation, and the cost of losing two.

    python benchmarks/sweep.py FOLDER [--backends local slurm-array ray] [--seconds 30] [--json results.json]

Evaluations sleep instead of computing, so four workers do not need four cores. slurm-array needs a Slurm, such as that
of `make slurm-sandbox` with its SLURM_CONF. FOLDER must be new and visible to all nodes. Every sweep is checked first:
all results are right, and only evaluations of lost workers were executed twice.

The time of a sweep is that of the call. It includes the start of Ray or of Slurm's jobs, of Python and of the model,
and the end of the workers. The ideal schedule assigns the same evaluations, longest first, to four workers that are
ready.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from durable_files import write_json
from halo_cluster.fan_out import Backend, LocalProcesses, Plan, RayActors, SlurmArray, Task, fan_out

WORKERS, EVALUATIONS = 4, 37
BACKENDS: dict[str, Callable[[], Backend]] = {
    "local": lambda: LocalProcesses(WORKERS),
    "slurm-array": lambda: SlurmArray(WORKERS),
    "ray": lambda: RayActors(WORKERS),
}
MUST = 0.90
LOAD_SHARE = 0.2  # loading before the first evaluation takes this share of an evaluation: 6 s of 30
LOST_AFTER = 14  # results; then two workers are lost half-way through their evaluations


def make_worker(setup: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The work of a worker: load, then evaluate. `setup` has "notes" (a folder) and "load" (seconds)."""
    notes = Path(setup["notes"])
    time.sleep(setup["load"])

    def evaluate(arguments: dict[str, Any]) -> dict[str, Any]:
        """Leave a note and sleep for "seconds". A file lose-<number> makes the process kill itself half-way."""
        number, begun = arguments["number"], time.monotonic()
        (notes / f"{number}.{begun:.3f}.{uuid.uuid4().hex[:8]}").touch()
        while (left := begun + arguments["seconds"] - time.monotonic()) > 0:
            doomed = left < arguments["seconds"] / 2 and (notes / f"lose-{number}").exists()
            if doomed and len(beginnings(notes)[number]) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(min(left, 0.1))
        return {"square": number**2, "begun": begun, "ended": time.monotonic(), "process": os.getpid()}

    return evaluate


def beginnings(notes: Path) -> dict[int, list[float]]:
    """Times at which each evaluation was started, on the monotonic clock of the machine."""
    found: dict[int, list[float]] = {}
    for path in notes.glob("*.*.*"):
        number, seconds, fraction, _ = path.name.split(".")
        found.setdefault(int(number), []).append(float(f"{seconds}.{fraction}"))
    return {number: sorted(times) for number, times in found.items()}


def lengths(mean: float) -> list[float]:
    """Seconds of every evaluation, evenly spaced from 0.5 to 1.5 times `mean`, longest first."""
    return [mean * (1.5 - number / (EVALUATIONS - 1)) for number in range(EVALUATIONS)]


def ideal_seconds(tasks: list[float]) -> float:
    """Time of a list schedule in the given order, without any overhead."""
    free_at = [0.0] * WORKERS
    for seconds in tasks:
        heapq.heappush(free_at, heapq.heappop(free_at) + seconds)
    return max(free_at)


class Loss(threading.Thread):
    """Marks half of the workers, which have evaluations in progress, for loss after LOST_AFTER results."""

    def __init__(self, results: Path, notes: Path) -> None:
        super().__init__(daemon=True)
        self._results, self._notes = results, notes
        self.published: set[int] = set()
        self.victims: list[int] = []

    def run(self) -> None:
        in_hand: list[int] = []
        while len(in_hand) < WORKERS:
            time.sleep(0.05)
            self.published, begun = self._done(), beginnings(self._notes)
            if len(self.published) >= LOST_AFTER:
                in_hand = sorted(begun.keys() - self.published, key=lambda number: begun[number][0])
        self.victims = in_hand[-WORKERS // 2 :]
        for number in self.victims:
            (self._notes / f"lose-{number}").touch()

    def _done(self) -> set[int]:
        return {int(path.stem) for path in self._results.glob("*.json")} if self._results.exists() else set()


def sweep(folder: Path, name: str, tasks: list[float], *, load: float, lose_half: bool) -> dict[str, Any]:
    """Run one sweep with one backend; AssertionError if its results or executions are wrong."""
    notes = folder / "notes"
    notes.mkdir(parents=True)
    plan = Plan(
        "benchmarks.sweep:make_worker",
        {"notes": str(notes), "load": load},
        tuple(Task(f"{n}", {"number": n, "seconds": seconds}) for n, seconds in enumerate(tasks)),
    )
    loss = Loss(folder / "sweep" / "results", notes)
    if lose_half:
        loss.start()
    called = time.monotonic()
    found = fan_out(folder / "sweep", plan, BACKENDS[name](), name=f"benchmark {name}")
    returned = time.monotonic()
    times = beginnings(notes)
    executions = Counter({number: len(begun) for number, begun in times.items()})
    assert {task: result["square"] for task, result in found.items()} == {
        str(number): number**2 for number in range(EVALUATIONS)
    }
    assert executions == {n: 2 if n in loss.victims else 1 for n in range(EVALUATIONS)}, executions
    ideal, wall = ideal_seconds(tasks), returned - called
    result: dict[str, Any] = {
        "backend": name,
        "seconds": round(wall, 2),
        "ideal_seconds": round(ideal, 2),
        "busy_in_the_ideal": round(sum(tasks) / (WORKERS * ideal), 4),
        "busy": round(sum(tasks) / (WORKERS * wall), 4),
        "ideal_of_measured": round(ideal / wall, 4),
        "executions": executions.total(),
    }
    if lose_half:
        assert len(loss.victims) == WORKERS // 2
        worked = [tasks[number] / 2 for number in loss.victims]
        again = [
            times[number][1] - times[number][0] - before
            for number, before in zip(loss.victims, worked, strict=True)
        ]
        return result | {
            "published_when_lost": len(loss.published),
            "published_executed_again": sum(executions[number] > 1 for number in loss.published),
            "lost_work_seconds": round(sum(worked), 2),
            "seconds_until_begun_again": [round(seconds, 2) for seconds in sorted(again)],
        }
    first = first_begins(found)
    assert len(first) == WORKERS, f"{len(first)} workers had evaluations"
    last = max(outcome["ended"] for outcome in found.values())
    return result | {
        "first_begun_after": [round(begun - called, 2) for begun in sorted(first)],
        "busy_without_start_up": round(sum(tasks) / sum(returned - begun for begun in first), 4),
        "returned_after_the_last": round(returned - last, 2),
    }


def first_begins(found: dict[str, Any]) -> list[float]:
    """Time at which each worker started its first evaluation."""
    first: dict[int, float] = {}
    for outcome in found.values():
        first[outcome["process"]] = min(outcome["begun"], first.get(outcome["process"], outcome["begun"]))
    return list(first.values())


def measure(folder: Path, backends: list[str], mean: float) -> dict[str, Any]:
    tasks, load = lengths(mean), LOAD_SHARE * mean
    measured: dict[str, Any] = {
        "environment": {
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "load_average": [round(value, 1) for value in psutil.getloadavg()],
        },
        "evaluations": EVALUATIONS,
        "workers": WORKERS,
        "evaluation_seconds": [round(tasks[-1], 2), round(tasks[0], 2)],
        "loading_seconds": load,
        "undisturbed": [],
        "half_lost": [],
    }
    for name in backends:
        for kind, lose_half in (("undisturbed", False), ("half_lost", True)):
            one = sweep(folder / f"{name}-{kind}", name, tasks, load=load, lose_half=lose_half)
            measured[kind].append(one)
            print(json.dumps(one), flush=True)
    return measured


def table(measured: dict[str, Any]) -> str:
    lines = [
        "| backend | seconds | ideal | all workers busy after | utilisation | without start-up | ideal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured["undisturbed"]:
        verdict = "must" if row["busy"] >= MUST else "MISSED"
        lines.append(
            f"| {row['backend']} | {row['seconds']:.1f} | {row['ideal_seconds']:.1f} | "
            f"{row['first_begun_after'][-1]:.1f} s | {row['busy']:.1%} ({verdict}) | "
            f"{row['busy_without_start_up']:.1%} | {row['busy_in_the_ideal']:.1%} |"
        )
    lines += [
        "",
        "| two of four killed | seconds | utilisation | work lost | restarted after | executions | of published ones |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured["half_lost"]:
        again = " and ".join(f"{seconds:.1f}" for seconds in row["seconds_until_begun_again"])
        lines.append(
            f"| {row['backend']} | {row['seconds']:.1f} | {row['busy']:.1%} | {row['lost_work_seconds']:.1f} s | "
            f"{again} s | {row['executions']} | {row['published_executed_again']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--seconds", type=float, default=30.0, help="mean length of an evaluation")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Workers import this file as a module of the repository.
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    measured = measure(options.folder.resolve(), options.backends, options.seconds)
    if options.json:
        write_json(options.json, measured)
    print(table(measured))


if __name__ == "__main__":
    main()
