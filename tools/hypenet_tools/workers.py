"""Worker processes. A worker requests an item of work, does it, reports bytes, and requests the next one.

Workers get nothing but item numbers and end by themselves when the pipe to their parent breaks. A killed parent
therefore leaves no process behind that writes. (concurrent.futures would: its workers wait for a killed parent forever,
and they cannot report progress.)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

import torch

from sharded_tensors.writer import Advance

BYTES_WORTH_A_WORKER = 256 * 2**20


def default_workers(nbytes: int) -> int:
    """One per core, but fewer where the work is too small to be worth their start."""
    return max(1, min(len(os.sched_getaffinity(0)), nbytes // BYTES_WORTH_A_WORKER))


def run_in_workers[T](
    work: Callable[[T, Advance], None], items: Sequence[T], workers: int, advance: Advance
) -> None:
    """Do `work` for all items, in this process (`workers` 1) or in several. Raises the first error of any worker."""
    if workers <= 1 or len(items) <= 1:
        for item in items:
            work(item, advance)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that are held by other threads
    processes, pipes = [], []
    try:
        for _ in range(min(workers, len(items))):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(work, items, there), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        _hand_out(len(items), pipes, advance)
    except (EOFError, ConnectionError):
        for process in processes:
            process.join(1.0)
        codes = [process.exitcode for process in processes if process.exitcode]
        raise RuntimeError(
            f"a worker process died (exit code {codes[0] if codes else 'unknown'}; out of memory?); "
            "the same command resumes"
        ) from None
    finally:
        for process in processes:
            process.kill()
            process.join()


def _hand_out(count: int, pipes: list[Connection], advance: Advance) -> None:
    """Give the next of `count` item numbers to every worker that requests one, until all are done."""
    left = iter(range(count))
    while pipes:
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            message = pipe.recv()
            if isinstance(message, BaseException):
                raise message
            if isinstance(message, int):
                advance(message)
                continue
            number = next(left, None)
            pipe.send(number)
            if number is None:
                pipes.remove(pipe)


def _serve[T](work: Callable[[T, Advance], None], items: Sequence[T], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends its workers
    torch.set_num_threads(1)
    try:
        while True:
            pipe.send(None)
            number = pipe.recv()
            if number is None:
                return
            try:
                work(items[number], pipe.send)
            except (BrokenPipeError, EOFError):
                raise
            except Exception as problem:
                pipe.send(problem)
                return
    except (BrokenPipeError, EOFError):  # the parent has ended
        os._exit(1)
