"""Child processes: start them with a log, let them end with their parent, end them.

A child gets a session of its own, so that Ctrl-C reaches the parent only, which then ends its children. Its stdin is a
pipe from the parent: the pipe's end tells the child that the parent is gone, whatever ended it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from halo_cluster.signals import ignore

GRACE_SECONDS = 10.0
Child = subprocess.Popen[bytes]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_child(
    command: Sequence[str], *, log: Path | None = None, environment: Mapping[str, str] | None = None
) -> Child:
    """Start `command`. Its stdout and stderr are appended to `log`, or are those of this process."""
    with open(log, "ab") if log else nullcontext() as out:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True
        )


def end_children(children: Sequence[Child], grace_seconds: float = GRACE_SECONDS) -> None:
    """Send SIGTERM to those that still run, and SIGKILL after `grace_seconds`; returns when all have ended."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + grace_seconds
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.stdin is not None:
            child.stdin.close()


def on_parent_end(act: Callable[[], None]) -> None:
    """In a child of `start_child` or `process_pool`: call `act`, in a thread, once the parent is gone."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        else:
            while os.read(0, 4096):  # not sys.stdin: Python aborts at exit when a thread still holds it
                pass
        act()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def end_with_parent() -> None:
    """In a child of `start_child` or `process_pool`: exit at once when the parent is gone.

    On Linux the kernel kills the child as well, which also works while the child hangs or is stopped. The kernel
    watches the thread that started the child, so that thread has to live as long as the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    on_parent_end(lambda: os._exit(1))


def process_pool(workers: int, initializer: Callable[..., object], *arguments: Any) -> ProcessPoolExecutor:
    """An executor whose processes leave Ctrl-C to this one and end with it, whatever ends it.

    The processes are spawned: a fork would copy locks that other threads of this process hold.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _begin_in_pool, (initializer, *arguments))


def _begin_in_pool(initializer: Callable[..., object], *arguments: Any) -> None:
    ignore(signal.SIGINT)
    end_with_parent()
    initializer(*arguments)
