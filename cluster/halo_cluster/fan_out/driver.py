"""The caller's side of a fan-out: start workers, replace lost ones, wait for all results."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halo_cluster.fan_out.plan import Plan
from halo_cluster.fan_out.task_pool import SILENT_SECONDS, FanOutFailed, TaskPool
from halo_cluster.fan_out.worker_pools import Backend, Launch, ReplacementLimit
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
    progress: Progress | None = None,
    silent_seconds: float = SILENT_SECONDS,
) -> dict[str, Any]:
    """Results of all tasks of `plan` by name, computed by `backend`'s workers unless `folder` has them already.

    However this call ends, the same call again computes only what has no result yet. Raises ValueError for an error of
    the user's, in the worker's words; FanOutFailed for a task that failed more than `plan.retries` times; StorageError.
    """
    with storage_errors(folder):
        pool = TaskPool(folder, plan, silent_seconds)
        pool.reset_failures()
        results = _Results(pool, progress)
        results.check()
        if not results.complete():
            launch = Launch(pool, plan.save(folder), name, results.check)
            limit = ReplacementLimit(pool, backend.workers)
            with backend.worker_pool(launch) as workers:
                while not results.complete():
                    replaced = limit.add(workers.ensure_running())
                    pool.release_lost()
                    results.check()
                    if not results.complete():
                        time.sleep(_POLL_SECONDS * (1 + replaced))
        return {task.name: pool.read_result(task) for task in plan.tasks}


class _Results:
    """Counts the results so far, and reports each to `progress`."""

    def __init__(self, pool: TaskPool, progress: Progress | None) -> None:
        self._pool = pool
        self._progress = progress
        self._published: set[str] = set()

    def check(self) -> None:
        """Raise if the tasks cannot be finished."""
        published = self._pool.published()
        for task in sorted(published - self._published):
            self._published.add(task)
            if self._progress is not None:
                self._progress(len(self._published), task)
        if not self.complete() and (failure := self._pool.failure()):
            error = ValueError(failure.sentence) if failure.user_error else FanOutFailed(failure.sentence)
            error.add_note(failure.traceback)
            raise error

    def complete(self) -> bool:
        return len(self._published) == len(self._pool.plan.tasks)
