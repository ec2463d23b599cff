"""The `checkpoints` folder of a training stage: step-00000100 and so on. Training resumes from the newest valid one.

A checkpoint is a folder of sharded tensors (see sharded_tensors) with one file per rank, rank-00000.safetensors and so
on. Its TRAINING.json has step, samples, recipe section, layout, code version and recent losses.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from durable_files import (
    FolderManifest,
    discard_leftovers,
    publish_folder,
    read_json,
    temporary_sibling,
    write_json,
)
from halo_training.checkpointing.random_states import restore_random_states
from halo_training.checkpointing.state import set_optimizer_step, training_shards
from hypenet_megatron.model import LocalModel
from sharded_tensors.index import (
    INDEX_FILE,
    RANDOM_PREFIX,
    TRAINING_FILE,
    Index,
    Sums,
    finish_folder,
    require_current_format,
)
from sharded_tensors.megatron import fill_pieces
from sharded_tensors.ranks import from_all_ranks, on_first_rank
from sharded_tensors.reader import NameFilter, StoredTensors

_STEP_PREFIX = "step-"
_DAMAGED = ".damaged"


def current_layout() -> dict[str, int]:
    """Ranks per axis of parallelism. Resuming is bit-exact at an equal layout, equal up to rounding at others."""
    return {
        "world": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def random_prefix(rank: int) -> str:
    """The prefix of the names of a rank's random states."""
    return f"{RANDOM_PREFIX}{rank}."


def _listed_files(folder: Path) -> dict[str, tuple[int, str]] | str:
    """The files in the manifest, which must list every other file of the folder, or one sentence on its damage."""
    manifest = folder / FolderManifest.FILE_NAME
    try:
        files = FolderManifest.read(folder).files
        present = {path.name for path in folder.iterdir()} | {INDEX_FILE, TRAINING_FILE}
    except (ValueError, OSError) as problem:
        return str(problem) if str(manifest) in str(problem) else f"{manifest} is damaged: {problem}"
    unlisted = present - files.keys() - {manifest.name}
    return f"{manifest} is damaged: it does not list {min(unlisted)}" if unlisted else files


@dataclass(frozen=True)
class TrainingCheckpoints:
    """Finds, verifies, loads, publishes and removes checkpoints.

    Keeps the newest `keep_last`, and those whose step is a multiple of `keep_every` (0: none).
    """

    folder: Path
    keep_last: int = 2
    keep_every: int = 0

    def steps(self) -> list[int]:
        names = (path.name.removeprefix(_STEP_PREFIX) for path in self.folder.glob(f"{_STEP_PREFIX}????????"))
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"{_STEP_PREFIX}{step:08d}"

    def newest_valid(self) -> tuple[int | None, list[str]]:
        """The newest checkpoint whose files match their checksums, and one sentence for each newer, damaged one.

        All ranks call this, and each reads a share of the files. ValueError for a checkpoint of an earlier version.
        """
        damage: list[str] = []
        for step in reversed(on_first_rank(self.steps)):
            problems = self._problems(self.path(step))
            if not problems:
                return step, damage
            damage.append(problems[0])
        return None, damage

    def _problems(self, folder: Path) -> list[str]:
        """One sentence per file that differs from what was published. Every rank gets all sentences."""
        require_current_format(folder)
        files = on_first_rank(lambda: _listed_files(folder))
        if isinstance(files, str):
            return [files]
        share = FolderManifest(files).share(dist.get_rank(), dist.get_world_size())
        try:
            found = list(share.problems(folder))
        except OSError as problem:
            found = [f"{folder} cannot be read: {problem}"]
        return [problem for problems in from_all_ranks(found) for problem in problems]

    def set_damaged_aside(self, newest_valid: int | None) -> None:
        """Rename checkpoints newer than `newest_valid`, so that they are ignored from then on.

        Also removes the unfinished folders of killed saves.
        """

        def rename() -> None:
            discard_leftovers(self.folder)
            for step in self.steps():
                if newest_valid is None or step > newest_valid:
                    aside = self.path(step).with_name(self.path(step).name + _DAMAGED)
                    shutil.rmtree(aside, ignore_errors=True)
                    self.path(step).rename(aside)

        on_first_rank(rename)

    def load(
        self,
        step: int,
        model: LocalModel,
        optimizer: MegatronOptimizer,
        keep: NameFilter | None,
    ) -> dict[str, Any]:
        """Restore weights and optimizer in place and, at the layout of the save, the random states.

        Returns the content of TRAINING.json. ValueError if tensors are missing or of another shape.
        """
        folder, prefix = self.path(step), random_prefix(dist.get_rank())
        training: dict[str, Any] = read_json(folder / TRAINING_FILE)
        stored = StoredTensors(folder, lambda name: not name.startswith(RANDOM_PREFIX) or name.startswith(prefix))
        fill_pieces(training_shards(model, optimizer, keep), stored, folder)
        set_optimizer_step(optimizer, training["optimizer_step"])
        if training["layout"] == current_layout():
            names = [name for name in stored if name.startswith(prefix)]
            restore_random_states({name.removeprefix(prefix): stored[name] for name in names})
        return training

    def publish(
        self,
        temporary: Path,
        step: int,
        written: Sequence[tuple[Index, Sums]],
        metadata: Mapping[str, Any],
        training: Mapping[str, Any],
    ) -> list[Path]:
        """Publish a save that all ranks have written, and retire old checkpoints. Only the first rank calls this.

        Returns the retired folders, which the caller should remove. If it is killed first, a later save or run does so.
        """
        write_json(temporary / TRAINING_FILE, dict(training))
        finish_folder(temporary, written, metadata)
        publish_folder(temporary, self.path(step))
        return self._retire_old(step)

    def _retire_old(self, newest: int) -> list[Path]:
        retired = []
        kept = [step for step in self.steps() if not (self.keep_every and step % self.keep_every == 0)]
        for step in kept[: -self.keep_last]:
            if step < newest:
                # Renamed first, so that a kill during the removal does not leave a damaged checkpoint.
                retired.append(temporary_sibling(self.path(step)))
                self.path(step).rename(retired[-1])
        return retired
