"""Processes for tests that have torch, Megatron and this repository imported when they start.

They are forks of a server that imports everything once for each pytest process. A fresh interpreter would spend five
seconds of CPU time on imports, and the tests start hundreds of processes.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


def describe_world(rank: int, ranks: int, folder: Path) -> None:
    """Name this rank in the environment, as the product's `run_ranks` does. Rank 0 publishes its address in `folder`,
    so every world needs another one."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "HALO_RENDEZVOUS": str(folder),
    }


def run_ranks(ranks: int, main: Callable[..., None], *arguments: Any, seconds: float = 500.0) -> None:
    """Run main(rank, *arguments) in `ranks` processes that can form one world.

    The first rank that fails ends the others, and its traceback is the error of the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_rank_main, args=(rank, ranks, Path(folder), main, arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        try:
            while any(process.exitcode is None for process in processes):
                assert not any(process.exitcode for process in processes), "a rank failed"
                assert time.monotonic() < end, f"the ranks did not end within {seconds:.0f} s"
                time.sleep(0.02)
            assert [process.exitcode for process in processes] == [0] * ranks
        except AssertionError as problem:
            errors = [path.read_text() for path in sorted(Path(folder).glob("rank-*"))]
            raise AssertionError("\n".join([str(problem), *errors])) from None
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank_main(
    rank: int, ranks: int, folder: Path, main: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    import torch


    describe_world(rank, ranks, folder / "world")
    torch.set_num_threads(1)
    try:
        main(rank, *arguments)
    except BaseException:
        (folder / f"rank-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
