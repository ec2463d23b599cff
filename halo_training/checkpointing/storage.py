"""The files of a training checkpoint: a safetensors file per rank, and INDEX.json, which says what lies where.

Megatron's torch_dist format keeps its index as a pickle and every object in pickles. Planning and resharding are
torch.distributed.checkpoint's, as there; only what touches the disk is ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.checkpointable import (
    CheckpointableShardedTensor,
    LocalShardsContainer,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from durable_files import read_json

INDEX_FILE = "INDEX.json"
FORMAT = "hypenet-megatron training checkpoint 1"
_RANK_FILE = re.compile(r"rank-\d{5}\.safetensors")
_HASHED_AT_ONCE = 2**24
_SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_DTYPES = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def chunk_name(key: str, offsets: Sequence[int]) -> str:
    """Name of a rectangle in its rank's file: the global tensor and where in it the rectangle begins."""
    return f"{key}@{','.join(map(str, offsets))}"


def checkpointable(shards: Sequence[ShardedTensor]) -> dict[str, LocalShardsContainer]:
    """Sharded tensors grouped by key, in the form that torch.distributed.checkpoint plans with."""
    grouped: dict[str, list[CheckpointableShardedTensor]] = defaultdict(list)
    for shard in shards:
        grouped[shard.key].append(CheckpointableShardedTensor.from_sh_ten(shard))
    return {key: LocalShardsContainer(group) for key, group in grouped.items()}


@dataclass(frozen=True)
class WrittenFile:
    """What a rank wrote: which rectangles, (key, offsets), and the size in bytes and SHA-256 of the file."""

    name: str
    chunks: tuple[tuple[str, tuple[int, ...]], ...]
    size: int
    digest: str


def _in_pieces(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """Bytes of contiguous tensors in order; a piece holds until the next one is asked for.

    Those on a GPU come through a piece of pinned memory, on the current CUDA stream.
    """
    window: Tensor | None = None
    for tensor in tensors:
        for piece in tensor.reshape(-1).view(torch.uint8).split(_HASHED_AT_ONCE):
            if piece.is_cuda:
                if window is None:
                    window = torch.empty(_HASHED_AT_ONCE, dtype=torch.uint8, pin_memory=True)
                piece = window[: len(piece)].copy_(piece, non_blocking=True)
                torch.cuda.current_stream().synchronize()
            yield memoryview(piece.numpy())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write contiguous tensors and flush them to the disk; returns size and SHA-256, taken from memory, not read back.

    The library's own writer holds Python's lock all the while, and training would wait for it.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:

        def put(content: bytes | memoryview) -> None:
            digest.update(content)
            written = file.write(content)
            while written < len(content):  # a nearly full disk takes a part, then refuses the rest
                written += file.write(content[written:])

        put(len(text).to_bytes(8, "little"))
        put(text)
        for piece in _in_pieces(tensors.values()):
            put(piece)
        os.fsync(file.fileno())
    return 8 + len(text) + end, digest.hexdigest()


def index_content(metadata: Metadata, written: Sequence[WrittenFile]) -> dict[str, Any]:
    """INDEX.json from the global plan and what the ranks wrote for it; every planned rectangle is in some file."""
    where = {chunk: file.name for file in written for chunk in file.chunks}
    tensors = {}
    for key, planned in metadata.state_dict_metadata.items():
        assert isinstance(planned, TensorStorageMetadata)
        tensors[key] = {
            "dtype": _SAFETENSORS_NAMES[planned.properties.dtype],
            "shape": list(planned.size),
            "chunks": [
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": where[key, tuple(chunk.offsets)],
                }
                for chunk in planned.chunks
            ],
        }
    return {"format": FORMAT, "tensors": tensors}


def _read_index(path: Path) -> tuple[Metadata, dict[tuple[str, tuple[int, ...]], str]]:
    """INDEX.json as torch's planner wants it, and the file of every rectangle (key, offsets).

    ValueError if it is not one of ours or names files elsewhere.
    """
    content = read_json(path)
    files: dict[tuple[str, tuple[int, ...]], str] = {}
    state: dict[str, Any] = {}
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"{path} is of format {content['format']!r}, this code reads {FORMAT!r}")
        for key, entry in content["tensors"].items():
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"]))
                for chunk in entry["chunks"]
            ]
            for chunk in entry["chunks"]:
                if not _RANK_FILE.fullmatch(chunk["file"]):
                    raise ValueError(f"{path} names {chunk['file']!r}, which is no file of a checkpoint")
                files[key, tuple(chunk["offsets"])] = chunk["file"]
            properties = TensorProperties(_DTYPES[entry["dtype"]])
            state[key] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path} is not the index of a training checkpoint") from problem
    return Metadata(state), files


class SafetensorsReader(dcp.StorageReader):
    """Reads what a load plan asks for, slice by slice, from the files that INDEX.json names."""

    def __init__(self, folder: Path):
        """Raises the ValueError of a bad index."""
        self.folder = folder
        self._metadata, self._files = _read_index(folder / INDEX_FILE)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def _file_of(self, index: MetadataIndex) -> str:
        assert index.offset is not None
        return self._files[index.fqn, tuple(index.offset)]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self._file_of(item.storage_index)].append(item)
        for name, items in by_file.items():
            path = self.folder / name
            try:
                with safe_open(path, framework="pt") as file:
                    for item in items:
                        stored = file.get_slice(
                            chunk_name(item.storage_index.fqn, item.storage_index.offset or ())
                        )
                        wanted = tuple(
                            slice(begin, begin + length)
                            for begin, length in zip(item.storage_offsets, item.lengths, strict=True)
                        )
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(stored[wanted])
                        planner.commit_tensor(item, target)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done


def load_shards(folder: Path, shards: Sequence[ShardedTensor]) -> None:
    """Fill the `data` of `shards` in place from a checkpoint of any layout. ValueError names what is missing."""
    reader = SafetensorsReader(folder)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # every rank reads for itself
            dcp.load(
                checkpointable(shards),
                storage_reader=reader,
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,
            )
    except dcp.CheckpointException as wrapped:  # torch's, which is no Exception and says nothing itself
        cause = next(iter(wrapped.failures.values()))[0]
        if isinstance(cause, (ValueError, RuntimeError)):
            raise ValueError(f"{folder} does not fit this run: {cause}") from wrapped
        raise cause from wrapped


def read_rank_tensors(folder: Path, rank: int, prefix: str) -> dict[str, Tensor]:
    """Tensors of a rank's file that are its own, not rectangles of global ones; names without `prefix`."""
    with safe_open(folder / rank_file(rank), framework="pt") as file:
        return {
            name.removeprefix(prefix): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 (no dict)
            if name.startswith(prefix)
        }
