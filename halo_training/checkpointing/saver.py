"""Saves checkpoints while training continues: copy in memory, write in a thread, publish once all ranks have written.

The writer is a thread, unlike Megatron's, which is a spawned process. Copying, hashing and writing release Python's
global lock, so training hardly waits. A thread needs no pickling, shared memory or main guard, and it cannot outlive a
killed rank.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from durable_files import temporary_folder
from halo_training.checkpointing.copies import HeldCopies
from halo_training.checkpointing.folder import TrainingCheckpoints, random_prefix
from halo_training.checkpointing.random_states import random_states
from halo_training.checkpointing.state import training_shards
from hypenet_megatron.model import LocalModel
from hypenet_tools.model_weights import describe
from sharded_tensors.index import Index, Sums
from sharded_tensors.megatron import owned_tensors
from sharded_tensors.ranks import highest, on_first_rank, results_of_all_ranks
from sharded_tensors.reader import NameFilter
from sharded_tensors.rectangles import Rectangle, TensorInfo
from sharded_tensors.views import LocalRectangles
from sharded_tensors.writer import FileTensor, TensorFile, aligned, write_files

_POLL_SECONDS = 0.5


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _owned_state(
    model: LocalModel, optimizer: MegatronOptimizer, keep: NameFilter | None
) -> tuple[dict[str, TensorInfo], dict[tuple[str, Rectangle], Tensor]]:
    """The rectangles that this rank saves. Its random states are whole tensors."""
    infos, tensors = owned_tensors(training_shards(model, optimizer, keep))
    for name, state in random_states().items():
        info = TensorInfo(tuple(state.shape), state.dtype)
        infos[random_prefix(dist.get_rank()) + name] = info
        tensors[random_prefix(dist.get_rank()) + name, Rectangle.covering(info)] = state
    return infos, tensors


@dataclass
class _Save:
    """A save in flight. `outcome` is what this rank wrote, or the error that stopped it."""

    step: int
    temporary: Path
    metadata: Mapping[str, Any]
    training: Mapping[str, Any]
    thread: threading.Thread
    outcome: tuple[Index, Sums] | BaseException | None = None


class BackgroundSaver:
    """Saves checkpoints, at most one at a time.

    All ranks must call the methods in the same order, except `busy` and `before_update`. `published` is the step of the
    newest published checkpoint, from which training would resume if it were killed now.
    """

    def __init__(self, checkpoints: TrainingCheckpoints, keep: NameFilter | None):
        self.checkpoints = checkpoints
        self.keep = keep
        self.published = 0
        self._copies: HeldCopies[tuple[str, Rectangle]] = HeldCopies()
        self._save: _Save | None = None
        self._removal = threading.Thread()

    @property
    def in_flight(self) -> bool:
        """Whether a save has begun and is not yet published."""
        return self._save is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._save is not None and self._save.thread.is_alive()

    def begin(
        self,
        step: int,
        model: LocalModel,
        optimizer: MegatronOptimizer,
        training: Mapping[str, Any],
    ) -> None:
        """Copy the state after `step` finished steps and start writing it. Finishes an earlier save first."""
        self.finish()
        infos, sources = _owned_state(model, optimizer, self.keep)
        self.wait_for_removal()  # so that the disk never holds a retired checkpoint beside the new one
        temporary = on_first_rank(lambda: temporary_folder(self.checkpoints.path(step)))
        self._copies.take(sources)
        metadata = describe(model, self.keep).to_json()
        thread = threading.Thread(
            target=self._write, args=(temporary, dist.get_rank(), infos), name="checkpoint", daemon=True
        )
        self._save = _Save(step, temporary, metadata, training, thread)
        thread.start()

    def _write(self, folder: Path, rank: int, infos: Mapping[str, TensorInfo]) -> None:
        save = self._save
        assert save is not None
        try:
            with self._copies.complete() as tensors:
                view = LocalRectangles(infos, tensors)
                content = aligned(FileTensor(view, *key, infos[key[0]].dtype) for key in tensors)
                file = TensorFile(f"rank-{rank:05d}.safetensors", content)
                save.outcome = write_files(folder, [file])
        except BaseException as problem:
            save.outcome = problem

    def before_update(self) -> None:
        """Call this before the optimizer changes what is being copied."""
        self._copies.before_overwriting()

    def publish_written(self) -> None:
        """Publish the save in flight, which every rank has finished writing. If a rank failed, all raise its error."""
        save = self._save
        assert save is not None and save.outcome is not None
        self._save = None
        try:
            written = results_of_all_ranks(save.outcome)
        except BaseException:
            if dist.get_rank() == 0:
                shutil.rmtree(save.temporary, ignore_errors=True)
            raise

        def publish() -> None:
            old = self.checkpoints.publish(save.temporary, save.step, written, save.metadata, save.training)
            # Removing large files takes seconds, so a thread does it while training continues.
            self._removal = threading.Thread(target=_remove, args=(old,), name="old checkpoints")
            self._removal.start()

        on_first_rank(publish)
        self.published = save.step

    def finish(self, progress: Callable[[], None] = lambda: None) -> None:
        """Wait for the save in flight, if any, and publish it. Calls `progress` while any rank is still writing."""
        if self._save is None:
            return
        while highest([self.busy])[0]:
            self._save.thread.join(timeout=_POLL_SECONDS)
            progress()
        self.publish_written()

    def wait_for_removal(self) -> None:
        """Wait until retired checkpoints are removed. Returns at once on all ranks but the first."""
        if self._removal.ident is not None:
            self._removal.join()
