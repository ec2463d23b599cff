"""Save at one layout, load at another: a task trains from the start, or goes on from what another task saved.

`run` starts processes once for each number of ranks.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from durable_files import read_json
from halo_training.checkpointing import BackgroundSaver, TrainingCheckpoints
from halo_training.models import is_student_key
from halo_training.optimizer import build_optimizer
from halo_training.trainer import Trainer
from hypenet_megatron.runtime import ParallelLayout, joined_world, model_parallel
from hypenet_tools.model_weights import save_weights
from tests.support.fork_server import run_ranks
from tests.support.training_grid import SECTION, WINDOWS, Cell, objective_of
from tests.support.windows import cursor_of_this_rank

SAVED_STEP = 3
RESUMED_SECTION = SECTION.model_copy(update={"checkpoint_every": 2 * SAVED_STEP})


@dataclass(frozen=True)
class World:
    """A layout in so many processes, and the kind of training that is done there."""

    ranks: int
    layout: ParallelLayout
    kind: str = "finetune"

    @property
    def cell(self) -> Cell:
        return Cell(self.kind, True, self.layout)

    @property
    def name(self) -> str:
        return f"{self.ranks}-{self.cell.name}"


@dataclass(frozen=True)
class Task:
    """Train in `world` from the start (`source` None) or from what `source` saved."""

    world: World
    source: World | None = None

    def folder(self, root: Path) -> Path:
        return root / (f"{self.source.name}--to--{self.world.name}" if self.source else self.world.name)


def _trainer(cell: Cell, weights: Path, folder: Path) -> Trainer:
    cursor = cursor_of_this_rank(WINDOWS, SECTION)
    keep = is_student_key if cell.kind == "align" else None
    objective = objective_of(cell, weights)
    return Trainer(cell.name, RESUMED_SECTION, objective, cursor, folder, Console(quiet=True), keep)


def _save_again(cell: Cell, weights: Path, folder: Path) -> None:
    """Load the checkpoint in `folder` and save what was loaded to `folder`/again."""
    trainer = _trainer(cell, weights, folder)
    optimizer = build_optimizer(trainer.objective.chunks, RESUMED_SECTION)
    training = trainer.checkpoints.load(SAVED_STEP, trainer.model, optimizer, trainer.keep_keys)
    saver = BackgroundSaver(TrainingCheckpoints(folder / "again"), trainer.keep_keys)
    saver.begin(SAVED_STEP, trainer.model, optimizer, training)
    saver.finish()


def do(task: Task, weights: Path, root: Path) -> None:
    """One task in this rank's part of the world."""
    folder = task.folder(root)
    if task.source is not None:
        if dist.get_rank() == 0:
            shutil.copytree(Task(task.source).folder(root) / "checkpoints", folder / "checkpoints")
        dist.barrier()
        _save_again(task.world.cell, weights, folder)
    trainer = _trainer(task.world.cell, weights, folder)
    trainer.run()
    save_weights(folder / "final", trainer.model, trainer.keep_keys)
    gc.collect()


def losses(task: Task, root: Path) -> list[float]:
    """Of the steps that this task did itself."""
    lines = (task.folder(root) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a training checkpoint but the random states, assembled by a second, simpler reader."""
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    whole = {}
    for key, entry in read_json(folder / "TENSORS.json")["tensors"].items():
        if key.startswith("random."):
            continue
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[entry["dtype"]]
        tensor = torch.full(entry["shape"], float("nan"), dtype=dtype)
        for part in entry["rectangles"]:
            place = tuple(
                slice(begin, begin + size) for begin, size in zip(part["offset"], part["shape"], strict=True)
            )
            is_all = part["shape"] == entry["shape"]
            name = key if is_all else f"{key}@{','.join(map(str, part['offset']))}"
            tensor[place] = files[part["file"]][name]
        assert not tensor.isnan().any(), key
        whole[key] = tensor
    return whole


def _rank_main(rank: int, tasks: Sequence[Task], weights: Path, root: Path) -> None:
    with joined_world():
        for task in tasks:
            with model_parallel(task.world.layout, seed=7):
                do(task, weights, root)


def run(tasks: Sequence[Task], weights: Path, root: Path) -> None:
    """All `tasks`, those of one number of ranks one after the other in the same processes."""
    for ranks in sorted({task.world.ranks for task in tasks}):
        here = [task for task in tasks if task.world.ranks == ranks]
        run_ranks(ranks, _rank_main, here, weights, root, seconds=2500)
