"""A worker: takes one task after another until none is left."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from halo_cluster.children import end_with_parent
from halo_cluster.fan_out.plan import Plan, WorkerFunction
from halo_cluster.fan_out.task_pool import Claim, Failure, TaskPool
from halo_cluster.heartbeat import Heartbeat

_SHORTEST_WAIT, _LONGEST_WAIT = 0.05, 1.0


def open_pool(plan_file: Path) -> TaskPool:
    """The task pool of a saved plan."""
    return TaskPool(plan_file.parent.parent, Plan.read(plan_file))


def work(pool: TaskPool, name: str, check: Callable[[], object] = lambda: None) -> None:
    """Do tasks as worker `name` until every task has a result or is given up; calls `check` between them.

    Failures of tasks, and of the worker function's setup, are left in the pool for the driver. This function raises
    only what `check` raises, and OSError of the pool's folder.
    """
    beat = Heartbeat(pool.register(name))
    try:
        if not pool.nothing_left():
            _work(pool, name, check)
    finally:
        beat.stop()
        with suppress(OSError):
            pool.mark_ended(name, "it left")


def _work(pool: TaskPool, name: str, check: Callable[[], object]) -> None:
    try:
        do = pool.plan.make_worker()
    except Exception as error:
        pool.worker_failed(name, Failure.of(error))
        return
    wait = _SHORTEST_WAIT
    while not (pool.nothing_left() or pool.has_to_end(name)):
        claim = pool.claim(name)
        if claim is not None:
            _attempt(pool, claim, do)
            wait = _SHORTEST_WAIT
        else:
            pool.release_lost()
            time.sleep(wait * random.uniform(0.5, 1.0))  # so that workers do not all poll at once
            wait = min(2 * wait, _LONGEST_WAIT)
        check()


def _attempt(pool: TaskPool, claim: Claim, do: WorkerFunction) -> None:
    arguments = next(task.arguments for task in pool.plan.tasks if task.name == claim.task)
    begun = time.monotonic()
    try:
        result = do(arguments)
    except Exception as error:
        pool.fail(claim, Failure.of(error))
    else:
        pool.publish(claim, arguments, result, time.monotonic() - begun)


def main(plan_file: str, name: str) -> None:
    """A worker's process; it ends with the one that started it."""
    end_with_parent()
    work(open_pool(Path(plan_file)), name)
