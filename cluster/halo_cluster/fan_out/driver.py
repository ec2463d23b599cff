"""The caller's side: start workers, see that lost ones are replaced, wait for all results."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halo_cluster.fan_out.crews import Backend, Launch, Patience
from halo_cluster.fan_out.plan import Plan
from halo_cluster.fan_out.task_pool import SILENT_SECONDS, FanOutFailed, TaskPool
from halo_cluster.storage import storage_errors

_LOOK_SECONDS = 0.2
Progress = Callable[[int, str], None]
"""Told how many tasks have a result, and the name of the newest one."""


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

    The same call again, after whatever end of this one, computes only what has no result. ValueError is a worker's own,
    an error of the user's; FanOutFailed names a task that failed more than `plan.retries` times; StorageError is of the
    disk.
    """
    with storage_errors(folder):
        pool = TaskPool(folder, plan, silent_seconds)
        pool.forgive()
        watch = _Watch(pool, progress)
        watch.look()
        if not watch.finished():
            launch = Launch(pool, plan.save(folder), name, watch.look)
            patience = Patience(pool, backend.workers)
            with backend.crew(launch) as crew:
                while not watch.finished():
                    vain = patience.after(crew.tend())
                    pool.release_lost()
                    watch.look()
                    if not watch.finished():
                        time.sleep(_LOOK_SECONDS * (1 + vain))
        return {task.name: pool.read_result(task) for task in plan.tasks}


class _Watch:
    """What has come in so far, told to `progress`."""

    def __init__(self, pool: TaskPool, progress: Progress | None) -> None:
        self._pool = pool
        self._progress = progress
        self._published: set[str] = set()

    def look(self) -> None:
        """Raise if the tasks cannot be finished."""
        published = self._pool.published()
        for task in sorted(published - self._published):
            self._published.add(task)
            if self._progress is not None:
                self._progress(len(self._published), task)
        if not self.finished() and (failure := self._pool.failure()):
            error = ValueError(failure.sentence) if failure.user_error else FanOutFailed(failure.sentence)
            error.add_note(failure.traceback)
            raise error

    def finished(self) -> bool:
        return len(self._published) == len(self._pool.plan.tasks)
