"""Saving while training goes on: copy in memory, write in a thread, publish when every rank has written.

A thread, not Megatron's spawned writer process: hashing, writing and flushing release Python's lock, so training
hardly waits; nothing has to be pickled to another process or mapped into its memory; no process outlives a rank that
is killed; and entry points need no main guard.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.metadata import Metadata

from halo_training.checkpointing.copies import HeldCopies
from halo_training.checkpointing.folder import RANDOM_PREFIX, TrainingCheckpoints
from halo_training.checkpointing.random_states import random_states
from halo_training.checkpointing.state import KeyFilter, training_shards
from halo_training.checkpointing.storage import (
    WrittenFile,
    checkpointable,
    chunk_name,
    rank_file,
    write_safetensors,
)
from hypenet_megatron.model import LocalModel
from sharded_tensors.ranks import from_all_ranks, highest, on_first_rank

_PATIENCE_SECONDS = 0.5


@dataclass(frozen=True)
class _Failure:
    """Why a rank could not write, in a form that other ranks can raise too."""

    rank: int
    error: OSError | None
    text: str

    @classmethod
    def of(cls, rank: int, problem: BaseException, path: Path) -> _Failure:
        if isinstance(problem, OSError):
            return cls(rank, OSError(problem.errno, problem.strerror, str(path)), "")
        return cls(rank, None, f"{type(problem).__name__}: {problem}")


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Save:
    """A save in flight."""

    step: int
    temporary: Path
    plan: Metadata | None  # on the first rank
    training: Mapping[str, Any]
    thread: threading.Thread
    outcome: WrittenFile | _Failure | None = None


class BackgroundSaver:
    """Saves checkpoints, at most one at a time. All ranks call its methods in the same order, `busy` and
    `before_update` apart.

    `published` is the step of the newest checkpoint: what a kill at this moment would leave.
    """

    def __init__(self, checkpoints: TrainingCheckpoints, keep: KeyFilter | None):
        self.checkpoints = checkpoints
        self.keep = keep
        self.published = 0
        self._copies = HeldCopies()
        self._save: _Save | None = None
        self._removal = threading.Thread()

    @property
    def in_flight(self) -> bool:
        """A save was begun and is not yet published."""
        return self._save is not None

    @property
    def busy(self) -> bool:
        """This rank is still writing."""
        return self._save is not None and self._save.thread.is_alive()

    def begin(
        self,
        step: int,
        model: LocalModel,
        optimizer: MegatronOptimizer,
        training: Mapping[str, Any],
    ) -> None:
        """Copy the state after `step` finished steps and start to write it. Finishes an earlier save first."""
        self.finish()
        shards = training_shards(model, optimizer, self.keep)
        main = [shard for shard in shards if is_main_replica(shard.replica_id)]
        planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(checkpointable(main), is_coordinator=dist.get_rank() == 0)
        local_plan = planner.create_local_plan()
        plans: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(local_plan, plans)
        plan = planner.create_global_plan(plans)[1] if plans is not None else None
        self.wait_for_removal()  # the disk need not hold what goes and what comes
        temporary = on_first_rank(lambda: self.checkpoints.new_temporary(step))
        names = {(item.index.fqn, tuple(item.index.offset)): item for item in local_plan.items}
        sources = {chunk_name(*chunk): planner.resolve_data(item) for chunk, item in names.items()}
        sources |= {RANDOM_PREFIX + name: state for name, state in random_states().items()}
        self._copies.take(sources)
        path = temporary / rank_file(dist.get_rank())
        thread = threading.Thread(
            target=self._write, args=(path, tuple(names)), name="checkpoint", daemon=True
        )
        self._save = _Save(step, temporary, plan, training, thread)
        thread.start()

    def _write(self, path: Path, chunks: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
        save, rank = self._save, int(path.stem.removeprefix("rank-"))
        assert save is not None
        try:
            with self._copies.complete() as tensors:
                size, digest = write_safetensors(path, tensors)
            save.outcome = WrittenFile(path.name, chunks, size, digest)
        except BaseException as problem:
            save.outcome = _Failure.of(rank, problem, path)

    def before_update(self) -> None:
        """Called before the optimizer changes what is being copied."""
        self._copies.before_overwriting()

    def publish_written(self) -> None:
        """Publish the save in flight, which no rank is busy with any more. If a rank failed, all raise its error."""
        save = self._save
        assert save is not None and save.outcome is not None
        self._save = None
        outcomes = from_all_ranks(save.outcome)
        failures = [outcome for outcome in outcomes if isinstance(outcome, _Failure)]
        if failures:
            if dist.get_rank() == 0:
                shutil.rmtree(save.temporary, ignore_errors=True)
            raise failures[0].error or RuntimeError(
                f"rank {failures[0].rank} could not write checkpoint {save.step}: {failures[0].text}; "
                "the checkpoint before it is intact"
            )
        written = [outcome for outcome in outcomes if isinstance(outcome, WrittenFile)]

        def publish() -> None:
            assert save.plan is not None
            old = self.checkpoints.publish(save.temporary, save.step, save.plan, written, save.training)
            # Large files take seconds to go, and training would wait.
            self._removal = threading.Thread(target=_remove, args=(old,), name="old checkpoints")
            self._removal.start()

        on_first_rank(publish)
        self.published = save.step

    def finish(self, progress: Callable[[], None] = lambda: None) -> None:
        """Wait for the save in flight, if any, and publish it. `progress` is called while any rank writes."""
        if self._save is None:
            return
        while highest([self.busy])[0]:
            self._save.thread.join(timeout=_PATIENCE_SECONDS)
            progress()
        self.publish_written()

    def wait_for_removal(self) -> None:
        """Until what the newest checkpoint replaced is gone from the disk; at once on all ranks but the first."""
        if self._removal.ident is not None:
            self._removal.join()
