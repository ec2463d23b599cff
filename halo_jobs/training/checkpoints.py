"""Weights folders, what a stage hands on: Megatron distributed checkpoints, published whole.

Checkpoints to resume from are another thing: halo_jobs/checkpointing.
"""

from __future__ import annotations

import os
import queue
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from durable_files import FolderManifest, discard_leftovers, publish_folder, temporary_sibling
from halo_jobs.checkpointing.ranks import on_first_rank
from hypenet_megatron.model import LocalModel

# Megatron has a process of its own for the results of writers in other processes, and that process outlives a parent
# that is killed. Our writers are threads of this one.
filesystem_async._results_queue = queue.Queue()

KeyFilter = Callable[[str], bool]
_METADATA_FORMAT = "fully_reshardable"
_ROOM_BYTES = 2**20


def _metadata() -> dict[str, Any]:
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": _METADATA_FORMAT,
    }


def sharded_weights(model: LocalModel, keep: KeyFilter | None = None) -> dict[str, Any]:
    """The model's sharded state dict, restricted to the keys that `keep` accepts."""
    state = model.sharded_state_dict(metadata=_metadata())
    return {key: value for key, value in state.items() if keep is None or keep(key)}


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """Undo what torch does to exceptions: it wraps even Ctrl-C in a CheckpointException, which is no Exception, and
    of a write that failed it keeps a phrase about zip files. `folder` is where it wrote."""
    try:
        yield
    except CheckpointException as wrapped:
        causes = [cause for cause, _ in wrapped.failures.values()]
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            raise KeyboardInterrupt from wrapped
        _raise_if_full(folder)
        raise RuntimeError(f"{folder} could not be written or read: {causes[0]}") from wrapped


def _raise_if_full(folder: Path) -> None:
    """Ask for as little room as a failed write must have lacked: OSError (disk full, quota, read-only) if refused."""
    probe = folder / "room"
    try:
        with open(probe, "wb") as handle:
            os.posix_fallocate(handle.fileno(), 0, _ROOM_BYTES)
    except OSError as error:
        error.filename = str(folder)
        raise
    finally:
        with suppress(OSError):
            probe.unlink()


def _new_temporary(folder: Path) -> Path:
    discard_leftovers(folder.parent)
    temporary = temporary_sibling(folder)
    temporary.mkdir(parents=True)
    return temporary


def _publish(temporary: Path, folder: Path) -> None:
    FolderManifest.write(temporary)
    publish_folder(temporary, folder)


def _save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` under a temporary name, every process its part, and publish it as `folder`."""
    temporary = on_first_rank(lambda: _new_temporary(folder))
    try:
        with _plain_errors(temporary):
            dist_checkpointing.save(state, str(temporary))
        on_first_rank(lambda: _publish(temporary, folder))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check(folder: Path) -> None:
    """ValueError naming the first damaged file of a checkpoint."""
    for problem in FolderManifest.read(folder).problems(folder):
        raise ValueError(f"{problem}; delete {folder} and rerun to make it again")


def save_weights(folder: Path, model: LocalModel, keep: KeyFilter | None = None) -> None:
    _save(folder, sharded_weights(model, keep))


def load_weights(folder: Path, model: LocalModel, *, rename: Callable[[str], str] | None = None) -> None:
    """Load a weights folder into `model`, strictly. `rename` maps a key of the whole model (layer numbers count from
    the first layer of all) to the stored key; what it maps to "" is left as it is in the model."""
    _check(folder)
    wanted: dict[str, Any] = {}
    left_alone = set()
    for name, entry in sharded_weights(model).items():
        # Gated feed-forward weights come as factories (two halves under one key), all others as tensors.
        is_tensor = isinstance(entry, (ShardedTensor, ShardedTensorFactory))
        stored = (rename(entry.key) if rename else entry.key) if is_tensor else ""
        if stored:
            entry.key = stored
            wanted[name] = entry
        else:
            left_alone.add(name)
    with _plain_errors(folder):
        loaded = dist_checkpointing.load(wanted, str(folder))
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected, f"keys of our own making: {unexpected}"
    assert left_alone.issuperset(missing), f"neither loaded nor left alone: {set(missing) - left_alone}"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a weights folder, whole, on the CPU (one process)."""
    _check(folder)
    with _plain_errors(folder):
        tensors = dist_checkpointing.load_plain_tensors(str(folder))
    return {key: tensor.cpu() for key, tensor in tensors.items()}


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """A weights folder from whole tensors (one process), readable like any other."""
    _save(folder, {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in tensors.items()})


def _parts(entry: Any) -> list[ShardedTensor]:
    """The pieces of whole tensors that a sharded state dict's entry stands for; their data are views of the model's."""
    if isinstance(entry, ShardedTensorFactory):
        return list(nested_values(entry.build()))
    return [entry] if isinstance(entry, ShardedTensor) else []


def load_full_tensors(model: LocalModel, tensors: dict[str, Tensor]) -> None:
    """Whole tensors into this rank's part of a model, in its dtype; ValueError on a key or shape that differs."""
    parts = [part for entry in sharded_weights(model).values() for part in _parts(entry)]
    missing = {part.key for part in parts} - tensors.keys()
    if (
        parallel_state.get_pipeline_model_parallel_world_size() == 1
    ):  # else other stages may have what is left over
        missing |= tensors.keys() - {part.key for part in parts}
    if missing:
        raise ValueError(f"weights and model differ in tensor {min(missing)} ({len(missing)} in all)")
    with torch.no_grad():
        for part in parts:
            whole = tensors[part.key]
            if whole.shape != part.global_shape:
                raise ValueError(
                    f"{part.key} has shape {tuple(whole.shape)}, the model needs {tuple(part.global_shape)}"
                )
            part.data.copy_(whole[part.global_slice()])
