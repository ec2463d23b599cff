"""Several processes that work on one stage together, as torchrun would start them; each node starts its own.

The processes live and die together: when one fails or is killed the others are ended, and all end with their parent,
whatever ends that. Rendezvous is by the environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). SIGTERM
and SIGUSR2 to the parent are requests to save and stop, and go to its first process, which agrees with the rest.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 0.1
_REPEAT_SECONDS = 3.0
_LOOK_ELSEWHERE_SECONDS = 1.0
_NEWS_SECONDS = 5.0


_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_REQUESTS = (signal.SIGTERM, signal.SIGUSR2)


class RankFailed(RuntimeError):
    """A process of the group did not end with 0: `code` is its exit code, or minus the signal that killed it."""

    def __init__(self, message: str, code: int, host: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.host = host or socket.gethostname()


@dataclass(frozen=True)
class Nodes:
    """The machines that share one stage: how many, which of them this is, and where the first one listens."""

    count: int = 1
    this: int = 0
    address: str = "127.0.0.1"
    port: int | None = None
    """None: any free one, which only a single machine can agree on."""


THIS_MACHINE = Nodes()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_log(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.txt"


def run_ranks(
    command: Sequence[str],
    ranks: int,
    logs: Path,
    nodes: Nodes = THIS_MACHINE,
    ended_elsewhere: Callable[[], bool] = lambda: False,
) -> None:
    """Run this node's part of `ranks` processes of `command` to their end; RankFailed if one does not end with 0.

    Process 0 has this one's stdout and stderr; what the others print goes to their `rank_log`. The command has to call
    `end_with_parent` first of all. Once `ended_elsewhere` says that a process of another node is gone, those here have
    a moment to notice, which they cannot before all have met. ValueError if nodes cannot share the processes evenly.
    """
    if ranks % nodes.count:
        raise ValueError(
            f"{ranks} processes cannot be shared evenly by {nodes.count} nodes; change layout.processes or nodes"
        )
    local_ranks = ranks // nodes.count
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": nodes.address}
    environment["MASTER_PORT"] = str(nodes.port or _free_port())
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_ranks)))
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as open_logs:
        try:
            for local_rank in range(local_ranks):
                rank = nodes.this * local_ranks + local_rank
                out = None if rank == 0 else open_logs.enter_context(open(rank_log(logs, rank), "ab"))
                processes.append(
                    subprocess.Popen(
                        command,
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(local_rank)},
                        stdin=subprocess.PIPE,
                        stdout=out,
                        stderr=out,
                        start_new_session=True,  # Ctrl-C is for the parent, who ends them
                    )
                )
            with _requests_passed_on(processes[0]):
                _wait(processes, nodes.this * local_ranks, ranks, ended_elsewhere)
        finally:
            _end(processes)


@contextmanager
def _requests_passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A second request of a kind does what it did before: the caller ends, and the processes with it.

    One that follows at once is the first again: a scheduler may signal this process and its launcher, who passes it on.
    """
    before: dict[int, Any] = {}
    asked: dict[int, float] = {}

    def pass_on(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - asked.setdefault(number, now) < _REPEAT_SECONDS:
            process.send_signal(number)
            return
        signal.signal(number, before[number])
        signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, pass_on) for number in _REQUESTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    first_rank: int,
    ranks: int,
    ended_elsewhere: Callable[[], bool],
) -> None:
    looked, deadline = time.monotonic(), math.inf
    while True:
        codes = [process.poll() for process in processes]
        if any(codes):
            break
        if None not in codes:
            return
        now = time.monotonic()
        if now >= deadline:
            raise RankFailed("a process on another node has ended", 1)
        if now - looked >= _LOOK_ELSEWHERE_SECONDS:
            looked = now
            if deadline == math.inf and ended_elsewhere():
                deadline = now + _NEWS_SECONDS
        time.sleep(_LOOK_SECONDS)
    # Whoever was killed took others along, which may have been seen first.
    time.sleep(_LOOK_SECONDS)
    failed = {rank: code for rank, process in enumerate(processes, first_rank) if (code := process.poll())}
    rank, code = min(failed.items(), key=lambda item: item[1])
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    raise RankFailed(f"process {rank} of {ranks} {how}", code)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask those still there to end, and after PATIENCE_SECONDS make them."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()


def end_with_parent() -> None:
    """In a process of `run_ranks`: end at once when the parent is gone, seen by the end of its pipe to our stdin.

    On Linux the kernel sees to it as well, for a process that hangs or is stopped sees nothing. What the kernel watches
    is the thread that started us, so that has to live as long as its process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        # Not sys.stdin: Python aborts at its end when a thread still holds that.
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
