"""One rank of a world of `multi_gpu.py`: does the rows of rows.json, and leaves what came of each beside it.

multi_gpu_ranks.py <folder of rows.json> <device>
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import json
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from multi_gpu_plan import CHECKED_STEPS, SAVED_STEP, SMALL, TINY, Row
from rich.console import Console

from durable_files import read_json, write_json
from halo_cluster.children import end_with_parent
from halo_cluster.ranks import rank_log
from halo_jobs.recipe import TrainingSection
from halo_training.batches import BatchCursor, TokenBatch
from halo_training.checkpointing import BackgroundSaver, TrainingCheckpoints
from halo_training.checkpointing.folder import current_layout
from halo_training.models import is_student_key
from halo_training.objectives import (
    AlignmentObjective,
    DistillationObjective,
    NextTokenObjective,
    Objective,
)
from halo_training.optimizer import build_optimizer
from halo_training.trainer import Trainer
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import LocalModel, build_model, model_chunks
from hypenet_megatron.presets import HYPENET_PRESETS, HypeNetPreset, ModelShape
from hypenet_megatron.runtime import ParallelLayout, joined_world, model_parallel
from sharded_tensors.megatron import model_pieces
from sharded_tensors.ranks import highest
from tokenized_data import Window

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of checks. Adam makes whole steps of signs that rounding may turn, which in bf16 it does more often.
LEARNING_RATES = {"fp32": 1e-3, "bf16": 3e-4}
# Heads for four tensor ranks and four context ranks, layers for two stages of two chunks.
PRESETS = {
    **HYPENET_PRESETS,
    TINY: HypeNetPreset(TINY, ModelShape(TINY, 4, 64, 96, 4, 4, 64, 128, True), (1,), 500.0),
    SMALL: HypeNetPreset(SMALL, ModelShape(SMALL, 8, 512, 1024, 8, 4, 64, 2048, True), (1, 6), 500.0),
}


class RandomWindows:
    """Sample n is the same random tokens and loss weights in every process."""

    def __init__(self, vocabulary: int, context_length: int):
        self.vocabulary, self.context_length = vocabulary, context_length

    def window(self, sample: int) -> Window:
        rng = np.random.default_rng(sample)
        weights = np.where(rng.random(self.context_length) < 0.5, 1.0, 4.0).astype(np.float32)
        tokens = rng.integers(0, self.vocabulary, self.context_length + 1)
        return Window(tokens, weights, "random", sample)


@torch.no_grad()
def initialise(model: LocalModel, seed: int) -> None:
    """Draw every tensor from (seed, name) alone, on the model's device: the same weights in every layout."""
    spread = model_chunks(model)[0].config.hidden_size ** -0.5
    for piece in model_pieces(model):
        digest = hashlib.sha256(f"{seed} {piece.key}".encode()).digest()
        generator = torch.Generator(piece.data.device)
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.randn(
            piece.global_shape, generator=generator, device=piece.data.device, dtype=piece.data.dtype
        )
        # Norm weights of one would hide a swapped shard.
        whole = 1 + 0.1 * whole if len(piece.global_shape) == 1 else whole * spread
        piece.data.copy_(whole[piece.global_slice()])


class Setting:
    """What a row trains, and where."""

    def __init__(self, row: Row, device: torch.device):
        self.row, self.device = row, device
        self.layout = ParallelLayout(**row.layout)
        self.preset = PRESETS[row.model]
        self.layout.check_model(self.preset.shape)
        self.layout.check_batch(row.context_length, row.global_batch, row.micro_batch, dist.get_world_size())
        windows = RandomWindows(self.preset.shape.vocab_size, row.context_length)
        self.cursor = BatchCursor.of_this_rank(windows, row.global_batch, row.micro_batch, device)

    def _model(self, part: str) -> LocalModel:
        """part: "teacher", "hybrid" or "aligned"."""
        shape = self.preset.shape
        hybrid = part == "hybrid"
        config = DecoderConfig.from_shape(
            shape,
            shape.hybrid_mixers(self.preset.attention_layers, "lightning") if hybrid else shape.teacher_mixers(),
            dtype=DTYPES[self.row.precision],
            # Made where it is used: drawing billions of numbers on the CPU takes minutes.
            **{
                **self.layout.megatron_options(),
                "use_cpu_initialization": False,
                "perform_initialization": False,
            },
        )
        model = build_model(config, student="lightning" if part == "aligned" else None).to(self.device)
        initialise(model, seed=len(part))
        for name, parameter in model.named_parameters():
            assert parameter.device.type == self.device.type, f"{name} is on {parameter.device}"
        return model

    def objective(self) -> Objective:
        if self.row.stage == "align":
            return AlignmentObjective(self._model("aligned"), self.layout)
        student = self._model("hybrid")
        if self.row.stage == "distill":
            return DistillationObjective(student, self._model("teacher"), self.layout)
        return NextTokenObjective(student, self.layout)

    def section(self, **values: Any) -> TrainingSection:
        return TrainingSection(
            context_length=self.row.context_length,
            global_batch=self.row.global_batch,
            micro_batch=self.row.micro_batch,
            **values,
        )


def check(row: Row, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Train with the product's trainer; losses of the steps done here."""
    setting = Setting(row, device)
    folder = scratch / row.name.replace(" ", "_")
    if row.continues and dist.get_rank() == 0:
        shutil.copytree(scratch / row.continues.replace(" ", "_") / "checkpoints", folder / "checkpoints")
    highest([0])  # all wait for the copy
    section = setting.section(
        steps=CHECKED_STEPS,
        learning_rate=LEARNING_RATES[row.precision],
        warmup_steps=2,
        checkpoint_every=2 * SAVED_STEP if row.saves or row.continues else 10 * CHECKED_STEPS,
    )
    keep = is_student_key if row.stage == "align" else None
    console = Console(quiet=True)
    trainer = Trainer(row.name, section, setting.objective(), setting.cursor, folder, console, keep)
    trainer.run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    first = SAVED_STEP if row.continues else 0
    assert [step["step"] for step in steps] == list(range(first + 1, CHECKED_STEPS + 1)), "it did not resume"
    return {
        "losses": [step["loss"] for step in steps],
        "gradient_norms": [step["gradient_norm"] for step in steps],
    }


class Steps:
    """Steps of one model on the same global batch, made beforehand."""

    def __init__(self, setting: Setting):
        self.objective = setting.objective()
        self.optimizer: MegatronOptimizer = build_optimizer(
            self.objective.chunks, setting.section(steps=1, learning_rate=1e-5)
        )
        self.batches: list[TokenBatch] = setting.cursor.batches(0)
        for chunk in model_chunks(self.objective.model):
            chunk.train()

    def step(self, saver: BackgroundSaver | None = None) -> float:
        """The loss; all of the step is done when it comes back."""
        for chunk in self.objective.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = float(self.objective.accumulate(self.batches))
        if saver is not None:
            saver.before_update()
        self.optimizer.step()
        torch.cuda.synchronize()
        if not 0.0 <= loss < 50.0:
            raise RuntimeError(f"the loss is {loss}")
        return loss

    def timed(self) -> float:
        """Seconds."""
        started = time.perf_counter()
        self.step()
        return time.perf_counter() - started


def speed(row: Row, device: torch.device, scratch: Path) -> dict[str, Any]:
    steps = Steps(Setting(row, device))
    before, timed = row.steps
    losses = [steps.step() for _ in range(before)]
    seconds = [steps.timed() for _ in range(timed)]
    usual = statistics.median(seconds)
    result = {
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second_per_gpu": row.tokens / usual / row.ranks,
    }
    if device.type == "cuda":
        free, memory = torch.cuda.mem_get_info()
        result["peak_in_use"] = memory - free  # NCCL's buffers and the context included
        result |= communication(steps)
    return result


def communication(steps: Steps) -> dict[str, Any]:
    """Shares of one step's time: NCCL kernels at work or waiting, and of that the time in which nothing is computed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        started = time.perf_counter_ns()
        steps.step()
        whole = time.perf_counter_ns() - started
    # Annotations of what Python did are on the GPU's timeline too, and span what they contain.
    kernels = [
        (event.start_ns(), event.start_ns() + event.duration_ns(), "nccl" in event.name().lower())
        for event in profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.device_type() == torch.autograd.DeviceType.CUDA
        and not (
            event.is_user_annotation() or event.name().startswith(("nccl:", "Optimizer.", "ProfilerStep"))
        )
    ]
    if not kernels:
        return {"profile": "the profiler saw no kernels"}
    at_work = _length(begin_end[:2] for begin_end in kernels)
    computing = _length((begin, end) for begin, end, nccl in kernels if not nccl)
    talking = _length((begin, end) for begin, end, nccl in kernels if nccl)
    return {
        "communication_share": talking / whole,
        "exposed_communication_share": (at_work - computing) / whole,
        "kernels": len(kernels),
    }


def _length(intervals: Iterator[tuple[int, int]]) -> int:
    """Of the union of intervals (begin, end)."""
    total, reached = 0, 0
    for begin, end in sorted(intervals):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def stall(row: Row, device: torch.device, scratch: Path) -> dict[str, Any]:
    """What a save costs beside the training, and while the training waits; as in benchmarks/checkpoints.py."""
    steps = Steps(Setting(row, device))
    folder = scratch / "stall"
    saver = BackgroundSaver(TrainingCheckpoints(folder, keep_last=1), None)

    def begin(number: int) -> None:
        state = {"step": number, "optimizer_step": number, "layout": current_layout()}
        saver.begin(number, steps.objective.model, steps.optimizer, state)

    def timed() -> float:
        started = time.perf_counter()
        steps.step(saver)
        highest([saver.busy])  # the trainer asks after every step
        return time.perf_counter() - started

    for _ in range(row.steps[0]):
        steps.step()
    usual = statistics.median(timed() for _ in range(row.steps[1]))
    beside = []
    for number in (1, 2):
        saver.finish()  # what the save before replaced is gone from the disk
        started = time.perf_counter()
        begin(number)
        count = 0
        while highest([saver.busy])[0]:
            steps.step(saver)
            count += 1
        saver.publish_written()
        whole = time.perf_counter() - started
        beside.append({"stall": whole - count * usual, "whole": whole, "steps_meanwhile": count})
    saver.finish()
    started = time.perf_counter()
    begin(3)
    saver.finish()
    waiting = time.perf_counter() - started
    size = sum(path.stat().st_size for path in saver.checkpoints.path(3).iterdir())
    highest([0])  # all have counted
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return {
        "seconds_per_step": usual,
        "bytes": size,
        "beside_the_training": beside,
        "training_waits": waiting,
    }


WORKS = {"check": check, "speed": speed, "stall": stall}


def perform(row: Row, scratch: Path, answer: Path, end: float) -> None:
    """Do the row in groups of its own layout and write `answer`. An error ends this process inside of the groups:
    leaving them would wait for the other ranks. So does a row that takes longer than it may."""
    started = time.monotonic()
    faulthandler.dump_traceback_later(max(1.0, min(row.limit_seconds, end - time.time())), exit=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with model_parallel(ParallelLayout(**row.layout), seed=7) as device:
        try:
            result = WORKS[row.work](row, device, scratch)
        except BaseException as problem:
            sentence = " ".join(str(problem).split())[:400]
            write_json(answer, {"error": f"{type(problem).__name__}: {sentence}"})
            traceback.print_exc()
            os._exit(1)
        if torch.cuda.is_available():
            result["peak_memory"] = torch.cuda.max_memory_allocated()
            result["peak_reserved"] = torch.cuda.max_memory_reserved()
        torch.cuda.synchronize()  # nothing is under way in groups that are about to end
    gc.collect()  # models refer to themselves by their hooks
    torch.cuda.empty_cache()
    faulthandler.cancel_dump_traceback_later()
    write_json(answer, {**result, "row_seconds": time.monotonic() - started, "environment": environment()})


def environment() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpu": "none: gloo on CPU", "torch": torch.__version__}
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory": torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def main(folder: Path, device: str) -> None:
    end_with_parent()
    rank = int(os.environ["RANK"])
    log = os.open(rank_log(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):  # rank 0 has the terminal otherwise
        os.dup2(log, descriptor)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no tensor has been made yet
        torch.set_num_threads(1)
    plan = read_json(folder / "rows.json")
    with joined_world():
        for number, content in enumerate(plan["rows"]):
            row = Row.from_json(content)
            perform(row, folder.parent.parent, folder / f"{number}.{rank}.json", plan["end"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
