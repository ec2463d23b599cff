"""The caller's side of a fan-out: start workers, replace lost ones, wait for all results."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halo_cluster.fan_out.plan import Plan
from halo_cluster.fan_out.task_pool import FanOutFailed, TaskPool
from halo_cluster.fan_out.worker_pools import Backend, Launch
from halo_cluster.storage import storage_errors

_POLL_SECONDS = 0.2
Progress = Callable[[int, str], None]
"""Receives the number of tasks with a result, and the name of the newest one."""


def fan_out(
    folder: Path,
    plan: Plan,
    backend: Backend,
    *,
    name: str,
    progress: Progress = lambda published, task: None,
) -> dict[str, Any]:
    """Results of all tasks of `plan` by name, computed by `backend`'s workers unless `folder` has them already.

    However this call ends, the same call again computes only what has no result yet. Raises ValueError for an error of
    the user's, in the worker's words; FanOutFailed for a task that failed more than `plan.retries` times; StorageError.
    """
    with storage_errors(folder):
        pool = TaskPool(folder, plan)
        pool.reset_failures()
        results = _Results(pool, progress, 9 + 3 * backend.workers)
        if not results.complete():
            workers = backend.worker_pool(Launch(pool, plan.save(folder), name, results.complete))
            try:
                while True:
                    workers.ensure_running()
                    pool.release_lost()
                    if results.complete():
                        break
                    time.sleep(_POLL_SECONDS)
            finally:
                workers.end()
        return {task.name: pool.read_result(task) for task in plan.tasks}


class _Results:
    """Counts the results so far, and reports each to `progress`. Any number of workers may end while results come in;
    more than `max_ended` without a new result end the fan-out."""

    def __init__(self, pool: TaskPool, progress: Progress, max_ended: int) -> None:
        self._pool, self._progress, self._max_ended = pool, progress, max_ended
        self._published: set[str] = set()
        self._ended_before = pool.ended_workers()

    def complete(self) -> bool:
        """Whether every task has a result. Raises if the tasks cannot be finished."""
        new = self._pool.published() - self._published
        for task in sorted(new):
            self._published.add(task)
            self._progress(len(self._published), task)
        if len(self._published) == len(self._pool.plan.tasks):
            return True
        if failure := self._pool.failure():
            error = ValueError(failure.sentence) if failure.user_error else FanOutFailed(failure.sentence)
            error.add_note(failure.traceback)
            raise error
        ended = self._pool.ended_workers()
        if new:
            self._ended_before = ended
        if (in_a_row := ended - self._ended_before) > self._max_ended:
            raise FanOutFailed(
                f"{in_a_row} workers in a row ended without a result; their logs are in {self._pool.workers}"
            )
        return False
