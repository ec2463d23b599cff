"""The weights of a training checkpoint as a model folder like any other, without its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from durable_files import FolderManifest, read_json
from halo_cluster.run_folder import RECIPE_FILE
from halo_jobs.checkpointing.storage import INDEX_FILE, SafetensorsReader, chunk_name
from halo_jobs.models import SHAPE_FILE, is_student_key, read_shape
from hypenet_tools.chunks import Chunk
from hypenet_tools.hf_config import ModelDescription
from hypenet_tools.mapping import mixers_of
from hypenet_tools.opened import TRAINING, OpenedModel, manifest_digest
from hypenet_tools.stored_chunks import ChunkedTensors, StoredChunk
from hypenet_tools.tensors import TensorInfo
from hypenet_tools.weights import DTYPES

OPTIMIZER_PREFIX = "optimizer."


def open_checkpoint(folder: Path) -> OpenedModel:
    """ValueError in one sentence for an index that is not one of ours, or a checkpoint outside its run."""
    SafetensorsReader(folder)  # refuses an index that is not one of ours, or names files elsewhere
    infos: dict[str, TensorInfo] = {}
    chunks: dict[str, list[StoredChunk]] = {}
    for key, entry in read_json(folder / INDEX_FILE)["tensors"].items():
        if not key.startswith(OPTIMIZER_PREFIX):
            infos[key] = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            chunks[key] = [
                StoredChunk(
                    chunk["file"],
                    chunk_name(key, chunk["offsets"]),
                    Chunk(tuple(chunk["offsets"]), tuple(chunk["sizes"])),
                )
                for chunk in entry["chunks"]
            ]
    view = ChunkedTensors(folder, INDEX_FILE, infos, chunks)
    sums = {name: digest for name, (_, digest) in FolderManifest.read(folder).files.items()}
    step = [{"step": "training", "from": folder.name, "digest": manifest_digest(folder)}]
    return OpenedModel(folder, TRAINING, _model_of(folder, infos), view, None, step, sums)


def _model_of(folder: Path, infos: Mapping[str, TensorInfo]) -> ModelDescription | None:
    """The model whose tensors a run's checkpoint has: sizes from the run's first stage, mixers from the tensors."""
    if any(is_student_key(key) for key in infos):
        return None
    run = next((parent for parent in folder.absolute().parents if (parent / RECIPE_FILE).is_file()), None)
    shapes = sorted(run.glob(f"*/*/{SHAPE_FILE}")) if run else []
    if not shapes:
        raise ValueError(
            f"{folder} lies in no run's folder, which has the model's sizes; copy the run as a whole"
        )
    shape = read_shape(shapes[0].parent)
    return ModelDescription(shape, mixers_of({key: info.shape for key, info in infos.items()}, shape), None)
