"""The body of each process of tests/support/small_ranks.py: a two-layer training, with the errors that `halo` shows."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from torch import Tensor

from halo_cluster import StopRequested
from halo_jobs.recipe import TrainingSection
from halo_jobs.terminal import STOPPED_EXIT_CODE, sentence
from halo_training.batches import TokenBatch
from halo_training.objectives import NextTokenObjective
from halo_training.trainer import Trainer
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import build_model
from hypenet_megatron.presets import ModelShape
from hypenet_megatron.runtime import ParallelLayout, cpu_backend, model_parallel, reset_seeds
from hypenet_tools.model_weights import save_weights
from sharded_tensors.writer import Advance, TensorFile
from tests.support.fork_server import describe_world
from tests.support.small_ranks import EVERY, STEPS, Job
from tests.support.windows import RandomWindows, cursor_of_this_rank
from tokenized_data import Window

cpu_backend.install()
SHAPE = ModelShape("tiny", 2, 32, 48, 4, 2, 8, 64, tied_embeddings=True)
CONTEXT = 16


@dataclass(frozen=True)
class _StallingWindows(RandomWindows):
    """Random windows that hang at the first one of step `stall_at`."""

    stall_at: int | None = None

    def window(self, sample: int) -> Window:
        while self.stall_at is not None and sample == 8 * self.stall_at:
            time.sleep(0.1)
        return super().window(sample)


class _Objective(NextTokenObjective):
    """Next token, at the pace of the job."""

    def __init__(self, job: Job, layout: ParallelLayout) -> None:
        reset_seeds(3)
        config = DecoderConfig.from_shape(
            SHAPE, SHAPE.hybrid_mixers((1,), "lightning"), **layout.megatron_options()
        )
        super().__init__(build_model(config), layout)
        self._job = job

    def accumulate(self, batches: Sequence[TokenBatch]) -> Tensor:
        time.sleep(self._job.step_seconds)
        return super().accumulate(batches)


def _train(job: Job, rank: int) -> None:
    layout = ParallelLayout(**job.layout)
    with model_parallel(layout, seed=7):
        section = TrainingSection(
            steps=STEPS,
            context_length=CONTEXT,
            global_batch=8,
            micro_batch=2,
            learning_rate=1e-3,
            warmup_steps=2,
            checkpoint_every=EVERY,
            watchdog_seconds=job.watchdog_seconds,
        )
        stall_at = job.stall_at if rank == 0 else None
        cursor = cursor_of_this_rank(_StallingWindows(CONTEXT, SHAPE.vocab_size, stall_at=stall_at), section)
        folder = Path(job.folder)
        objective = _Objective(job, layout)
        trainer = Trainer("small", section, objective, cursor, folder, Console(quiet=True))
        trainer.run()
        save_weights(folder / "final", trainer.model)


def _stretch_writes(job: Job, rank: int) -> None:
    write = TensorFile.write
    full = f"step-{job.unwritable_step:08d}" if job.unwritable_step and rank == job.ranks - 1 else None

    def slowly(file: TensorFile, folder: Path, *advance: Advance) -> tuple[int, str]:
        if not folder.name.startswith("step-"):
            return write(file, folder, *advance)
        if full and folder.name.startswith(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / file.name))
        time.sleep(job.write_seconds / 2)
        written = write(file, folder, *advance)
        time.sleep(job.write_seconds / 2)
        return written

    TensorFile.write = slowly  # type: ignore[method-assign]


def main(job: Job, rank: int) -> NoReturn:
    """The whole life of one rank."""
    describe_world(rank, job.ranks, Path(job.meeting))
    os.dup2(os.open(f"{job.folder}/stderr.{os.getpid()}", os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    _stretch_writes(job, rank)
    code = 1
    try:
        _train(job, rank)
        code = 0
    except StopRequested as request:
        os.write(2, f"error: {sentence(request)}\n".encode())
        code = STOPPED_EXIT_CODE
    except BaseException as problem:
        os.write(2, f"error: {sentence(problem)}\n".encode())
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        os._exit(code)
