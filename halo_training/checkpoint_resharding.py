"""Training checkpoints, optimizer and all, in the files of another layout, without a model.

Any checkpoint resumes at any layout as it is; in one that was written for the layout that resumes it, every rank has a
file of its own to read from beginning to end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from durable_files import FolderManifest, read_json, sha256_file, write_json
from halo_training.checkpoint_weights import shape_of, stored_tensors
from halo_training.checkpointing.folder import TRAINING_FILE
from halo_training.checkpointing.storage import FORMAT, INDEX_FILE, chunk_name, rank_file
from hypenet_tools.folder_job import Job, Sums
from hypenet_tools.hugging_face.aux_files import fingerprint
from hypenet_tools.layout import Layout
from hypenet_tools.open_model import manifest_digest
from sharded_tensors.safetensors_format import DTYPE_CODES
from sharded_tensors.writer import Shard, ShardTensor

_OPTIMIZER_STATE = re.compile(r"^optimizer\.state\.\w+\.")


def reshard_checkpoint_job(source: Path, out: Path, layout: Layout) -> Job:
    """The job that writes `source` as a checkpoint of `layout`, bit for bit the same tensors under the same keys.

    Random states, which belong to the ranks that saved them, stay behind; training draws no random number. ValueError
    in one sentence for a checkpoint outside its run or a layout that does not divide the model; from the job, before
    anything is published, if a file does not match its checksum.
    """
    manifest = FolderManifest.read(source)
    shape = shape_of(source)
    layout.require_divides(shape, shape.teacher_mixers())
    view = stored_tensors(source, lambda key: True)
    by_rank: dict[int, list[ShardTensor]] = {
        rank: [] for rank in range(layout.tensor * layout.pipeline)
    }  # as Megatron counts them, without data parallelism
    for key, info in view.infos.items():
        for rank, chunk in layout.chunks(_OPTIMIZER_STATE.sub("", key), info, shape.num_layers):
            name = chunk_name(key, chunk.offset)
            by_rank[rank.pipeline * layout.tensor + rank.tensor].append(
                ShardTensor(name, view, key, chunk, info.dtype)
            )
    shards = [Shard(rank_file(rank), tuple(tensors)) for rank, tensors in by_rank.items()]
    training = read_json(source / TRAINING_FILE)
    training["layout"] = {"tensor": layout.tensor, "pipeline": layout.pipeline}  # equal to no layout that ran
    training["resharded_from"] = {"name": source.absolute().name, "digest": manifest_digest(source)}

    def finish(folder: Path, sums: Sums) -> None:
        for problem in manifest.problems(source):
            raise ValueError(f"{problem}; reshard another checkpoint of the run")
        write_json(folder / INDEX_FILE, {"format": FORMAT, "tensors": _index(shards)})
        write_json(folder / TRAINING_FILE, training)
        small = {
            name: ((folder / name).stat().st_size, sha256_file(folder / name))
            for name in (INDEX_FILE, TRAINING_FILE)
        }
        FolderManifest({**sums, **small}).save(folder)

    identity = {
        "source": str(source.absolute()),
        "source_files": fingerprint(source),
        "layout": [layout.tensor, layout.pipeline],
        "step": "reshard with optimizer",
    }
    return Job(out, identity, shards, finish)


def _index(shards: list[Shard]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for shard in shards:
        for tensor in shard.tensors:
            info = tensor.view.infos[tensor.key]
            entry = {"dtype": DTYPE_CODES[info.dtype], "shape": list(info.shape), "chunks": []}
            chunk = {"offsets": tensor.chunk.offset, "sizes": tensor.chunk.shape, "file": shard.name}
            tensors.setdefault(tensor.key, entry)["chunks"].append(chunk)
    return tensors
