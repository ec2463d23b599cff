"""The grid of trainings that have to come out the same: kinds of training x parallel layouts x tied and untied heads.

`train` runs one cell with the real trainer from whole weights on disk. `train_in_ranks` starts a world of processes
once and runs all cells of that size in it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from rich.console import Console

from halo_jobs.recipe import TrainingSection
from halo_training import objectives
from halo_training.models import ModelBuilder
from halo_training.objectives import (
    AlignmentObjective,
    DistillationObjective,
    NextTokenObjective,
    Objective,
)
from halo_training.trainer import Trainer
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import LocalModel, build_model
from hypenet_megatron.presets import ModelShape
from hypenet_megatron.runtime import ONE_PROCESS, ParallelLayout, joined_world, model_parallel, reset_seeds
from hypenet_tools.model_weights import load_weights, save_weights
from tests.support.fork_server import run_ranks
from tests.support.windows import RandomWindows, cursor_of_this_rank

LAYOUTS = {  # by the number of ranks
    2: [
        ParallelLayout(tensor=2),
        ParallelLayout(tensor=2, sequence_parallel=True),
        ParallelLayout(pipeline=2),
        ParallelLayout(pipeline=2, first_stage_layers=1),
        ParallelLayout(pipeline=2, virtual_pipeline=2),
        ParallelLayout(context=2),
        ParallelLayout(distributed_optimizer=True),
        ParallelLayout(distributed_optimizer=True, overlap=True),
    ],
    4: [
        ParallelLayout(tensor=2, pipeline=2),
        ParallelLayout(tensor=2, context=2),
    ],
}
MORE_LAYOUTS = {  # what the ones above leave untouched, and what they do not meet in
    1: [
        ParallelLayout(recompute="attention"),
        ParallelLayout(recompute="layers"),
        ParallelLayout(distributed_optimizer=True),
    ],
    2: [
        ParallelLayout(),
        ParallelLayout(pipeline=2, pipeline_layout="Ettt|tL"),
        ParallelLayout(pipeline=2, virtual_pipeline=2, recompute="layers"),
        ParallelLayout(context=2, recompute="attention"),
    ],
    4: [
        ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True),
        ParallelLayout(tensor=2, context=2, sequence_parallel=True),
        ParallelLayout(pipeline=2, virtual_pipeline=2, context=2),
        ParallelLayout(pipeline=2, virtual_pipeline=2, distributed_optimizer=True, overlap=True),
        ParallelLayout(tensor=2, distributed_optimizer=True),
        ParallelLayout(context=2, distributed_optimizer=True),
        ParallelLayout(context=4),
    ],
}
KINDS = ("align", "distill", "finetune", "pretrain")
SINGLE = ONE_PROCESS
CONTEXT_LENGTH = 24
FRESH, TRAINED = "fresh", "trained"
SECTION = TrainingSection(
    steps=5,
    context_length=CONTEXT_LENGTH,
    global_batch=8,
    micro_batch=2,
    learning_rate=1e-3,
    warmup_steps=2,
    weight_decay=0.01,
)


def shape(tied: bool) -> ModelShape:
    """Two kv groups: with four ranks on a layer they are fewer than the ranks, and have to be repeated."""
    return ModelShape("tied" if tied else "untied", 4, 48, 80, 4, 2, 16, 96, tied_embeddings=tied)


@dataclass(frozen=True)
class Cell:
    """One training of the grid."""

    kind: str
    tied: bool
    layout: ParallelLayout

    @property
    def name(self) -> str:
        usual = dataclasses.asdict(SINGLE)
        named = {key: value for key, value in dataclasses.asdict(self.layout).items() if value != usual[key]}
        sizes = "_".join(f"{key}={value}" for key, value in named.items())
        return f"{self.kind}-{'tied' if self.tied else 'untied'}-{sizes}"


WINDOWS = RandomWindows(CONTEXT_LENGTH, 96)


def _model(part: str, tied: bool, layout: ParallelLayout) -> LocalModel:
    """part: "teacher", "hybrid" or "aligned"."""
    which = shape(tied)
    hybrid = part == "hybrid"
    config = DecoderConfig.from_shape(
        which,
        which.hybrid_mixers((1,), "lightning") if hybrid else which.teacher_mixers(),
        init_method_std=0.15,
        **layout.megatron_options(),
    )
    return build_model(config, student="lightning" if part == "aligned" else None)


def save_whole_weights(folder: Path) -> None:
    """The weights that every cell starts from (one process)."""
    for tied in (True, False):
        for seed, part in enumerate(("teacher", "hybrid", "aligned")):
            reset_seeds(seed)
            model = _model(part, tied, SINGLE)
            with torch.no_grad():  # norm weights of one would hide a swapped shard
                for name, parameter in model.named_parameters():
                    if "norm" in name:
                        parameter.copy_(torch.rand(parameter.shape) + 0.5)
            save_weights(folder / f"{part}-{tied}", model)


def _loaded(part: str, cell: Cell, weights: Path) -> LocalModel:
    model = _model(part, cell.tied, cell.layout)
    load_weights(weights / f"{part}-{cell.tied}", model)
    return model


def objective_of(cell: Cell, weights: Path) -> Objective:
    if cell.kind == "align":
        return AlignmentObjective(_loaded("aligned", cell, weights), cell.layout)
    if cell.kind == "distill":
        student, teacher = (_loaded(part, cell, weights) for part in ("hybrid", "teacher"))
        return DistillationObjective(student, teacher, cell.layout)
    part = "hybrid" if cell.kind == "finetune" else "teacher"
    return NextTokenObjective(_loaded(part, cell, weights), cell.layout)


def train(cell: Cell, weights: Path, folder: Path) -> None:
    """Train one cell in this rank's part of the world, which has the cell's layout; the numbers and the trained weights
    lie in `folder`. For pretraining, the weights that a stage would begin from are left there too."""
    if cell.kind == "pretrain":
        device = torch.device("cpu")
        builder = ModelBuilder(shape(cell.tied), torch.float32, device, cell.layout, student="lightning")
        save_weights(folder / cell.name / FRESH, builder.fresh_teacher(seed=5))
    if cell.layout.overlap:  # many small buckets, as a large model has
        objectives.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=1000)
    cursor = cursor_of_this_rank(WINDOWS, SECTION)
    objective = objective_of(cell, weights)
    Trainer(cell.name, SECTION, objective, cursor, folder / cell.name, Console(quiet=True)).run()
    save_weights(folder / cell.name / TRAINED, objective.model)


def numbers(cell: Cell, folder: Path) -> np.ndarray:
    """[steps, 2]: loss and gradient norm of every step."""
    lines = (folder / cell.name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return np.array([[row["loss"], row["gradient_norm"]] for row in rows])


def _rank_main(rank: int, cells: Sequence[Cell], weights: Path, folder: Path) -> None:
    with joined_world():
        for cell in cells:
            with model_parallel(cell.layout, seed=7):
                train(cell, weights, folder)
            gc.collect()  # models refer to themselves by their hooks, and keep the groups of their layout alive


def train_in_ranks(ranks: int, cells: Sequence[Cell], weights: Path, folder: Path) -> None:
    """All `cells`, one after the other, in one world of `ranks` processes."""
    run_ranks(ranks, _rank_main, cells, weights, folder, seconds=2500)
