"""The `checkpoints` folder of a training stage: step-00000100, ...; the newest valid one counts.

step-00000100/MANIFEST.json             size and SHA-256 of the other files
              INDEX.json                which rectangle of which tensor lies in which file
              TRAINING.json             step, samples, recipe section, layout, code version, recent losses
              rank-00000.safetensors    what that rank held, and its random states
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.metadata import Metadata

from durable_files import (
    FolderManifest,
    discard_leftovers,
    publish_folder,
    read_json,
    sha256_file,
    temporary_sibling,
    write_json,
)
from halo_training.checkpointing.layout import current_layout
from halo_training.checkpointing.random_states import restore_random_states
from halo_training.checkpointing.state import KeyFilter, set_optimizer_step, training_shards
from halo_training.checkpointing.storage import (
    INDEX_FILE,
    WrittenFile,
    index_content,
    load_shards,
    read_rank_tensors,
)
from hypenet_megatron.model import LocalModel
from sharded_tensors.ranks import from_all_ranks, on_first_rank

TRAINING_FILE = "TRAINING.json"
RANDOM_PREFIX = "random/"
_STEP_PREFIX = "step-"
_DAMAGED = ".damaged"


def _listed_files(folder: Path) -> dict[str, tuple[int, str]] | str:
    """What the manifest says, or what is wrong with it. It lists itself nowhere, but everything else."""
    manifest = folder / FolderManifest.FILE_NAME
    try:
        files = FolderManifest.read(folder).files
        there = {path.name for path in folder.iterdir()} | {INDEX_FILE, TRAINING_FILE}
    except (ValueError, OSError) as problem:
        return str(problem) if str(manifest) in str(problem) else f"{manifest} is damaged: {problem}"
    unlisted = there - files.keys() - {manifest.name}
    return f"{manifest} is damaged: it does not list {min(unlisted)}" if unlisted else files


@dataclass(frozen=True)
class TrainingCheckpoints:
    """Finds, checks, loads, publishes and drops checkpoints. Of the old ones the newest `keep_last` stay, and those
    whose step is a multiple of `keep_every` (0: none)."""

    folder: Path
    keep_last: int = 2
    keep_every: int = 0

    def steps(self) -> list[int]:
        names = (path.name.removeprefix(_STEP_PREFIX) for path in self.folder.glob(f"{_STEP_PREFIX}????????"))
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"{_STEP_PREFIX}{step:08d}"

    def newest_valid(self) -> tuple[int | None, list[str]]:
        """Newest checkpoint whose files match their checksums, and what is wrong with the newer ones.

        All ranks call it: each reads its share of the files.
        """
        damage: list[str] = []
        for step in reversed(on_first_rank(self.steps)):
            problems = self._problems(self.path(step))
            if not problems:
                return step, damage
            damage.append(problems[0])
        return None, damage

    def _problems(self, folder: Path) -> list[str]:
        """One sentence for each file that is not as it was published; every rank gets all of them."""
        files = on_first_rank(lambda: _listed_files(folder))
        if isinstance(files, str):
            return [files]
        names = sorted(files)[dist.get_rank() :: dist.get_world_size()]
        share = FolderManifest({name: files[name] for name in names})
        try:
            found = list(share.problems(folder))
        except OSError as problem:
            found = [f"{folder} cannot be read: {problem}"]
        return [problem for problems in from_all_ranks(found) for problem in problems]

    def set_damaged_aside(self, newest_valid: int | None) -> None:
        """Rename what is newer than `newest_valid`, so that it neither counts as kept nor is taken for a checkpoint.
        Half-written folders of killed saves go."""

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
        keep: KeyFilter | None,
    ) -> dict[str, Any]:
        """Restore weights and optimizer in place, and, at the layout that saved it, the random states.

        Returns TRAINING.json. ValueError if tensors are missing or of another shape.
        """
        folder = self.path(step)
        training: dict[str, Any] = read_json(folder / TRAINING_FILE)
        load_shards(folder, training_shards(model, optimizer, keep))
        set_optimizer_step(optimizer, training["optimizer_step"])
        if training["layout"] == current_layout():
            restore_random_states(read_rank_tensors(folder, dist.get_rank(), RANDOM_PREFIX))
        return training

    def new_temporary(self, step: int) -> Path:
        """An empty folder to write `step` into; what killed saves left goes. First rank only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        discard_leftovers(self.folder)
        temporary = temporary_sibling(self.path(step))
        temporary.mkdir()
        return temporary

    def publish(
        self,
        temporary: Path,
        step: int,
        plan: Metadata,
        written: Sequence[WrittenFile],
        training: Mapping[str, Any],
    ) -> list[Path]:
        """Make a save that all ranks have finished a checkpoint, and drop old ones. First rank only.

        Returns the folders that old ones are in now, for the caller to remove; a later save or run would do it too.
        """
        write_json(temporary / INDEX_FILE, index_content(plan, written))
        write_json(temporary / TRAINING_FILE, dict(training))
        files = {file.name: (file.size, file.digest) for file in written}
        for name in (INDEX_FILE, TRAINING_FILE):
            files[name] = ((temporary / name).stat().st_size, sha256_file(temporary / name))
        write_json(temporary / FolderManifest.FILE_NAME, {name: list(entry) for name, entry in files.items()})
        publish_folder(temporary, self.path(step))
        return self._drop_old(step)

    def _drop_old(self, newest: int) -> list[Path]:
        dropped = []
        kept = [step for step in self.steps() if not (self.keep_every and step % self.keep_every == 0)]
        for step in kept[: -self.keep_last]:
            if step < newest:
                # Under a temporary name: killed before it is removed, it is not taken for a damaged checkpoint.
                dropped.append(temporary_sibling(self.path(step)))
                self.path(step).rename(dropped[-1])
        return dropped
