"""The weights of a training checkpoint as a model folder like any other, without its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from durable_files import FolderManifest, read_json
from halo_cluster.run_folder import INPUTS_FILE, RECIPE_FILE
from halo_training.checkpointing.state import KeyFilter
from halo_training.checkpointing.storage import INDEX_FILE, SafetensorsReader, chunk_name
from halo_training.models import SHAPE_FILE, is_student_key, read_shape
from hypenet_megatron.presets import ModelShape
from hypenet_tools.hugging_face.config import ModelDescription
from hypenet_tools.hugging_face.mapping import mixers_of
from hypenet_tools.open_model import TRAINING, OpenedModel, manifest_digest
from sharded_tensors.reader import ChunkedTensors, StoredChunk
from sharded_tensors.rectangles import Chunk
from sharded_tensors.safetensors_format import DTYPES
from sharded_tensors.views import TensorInfo

OPTIMIZER_PREFIX = "optimizer."


def stored_tensors(folder: Path, keep: KeyFilter) -> ChunkedTensors:
    """The tensors of a checkpoint whose keys `keep` accepts. ValueError for an index that is not one of ours."""
    SafetensorsReader(folder)  # refuses an index that is not one of ours, or names files elsewhere
    infos: dict[str, TensorInfo] = {}
    chunks: dict[str, list[StoredChunk]] = {}
    for key, entry in read_json(folder / INDEX_FILE)["tensors"].items():
        if keep(key):
            infos[key] = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            chunks[key] = [
                StoredChunk(
                    chunk["file"],
                    chunk_name(key, chunk["offsets"]),
                    Chunk(tuple(chunk["offsets"]), tuple(chunk["sizes"])),
                )
                for chunk in entry["chunks"]
            ]
    return ChunkedTensors(folder, INDEX_FILE, infos, chunks)


def open_checkpoint(folder: Path) -> OpenedModel:
    """ValueError in one sentence for an index that is not one of ours, or a checkpoint outside its run."""
    view = stored_tensors(folder, lambda key: not key.startswith(OPTIMIZER_PREFIX))
    sums = {name: digest for name, (_, digest) in FolderManifest.read(folder).files.items()}
    step = [{"step": "training", "from": folder.name, "digest": manifest_digest(folder)}]
    return OpenedModel(folder, TRAINING, _model_of(folder, view.infos), view, None, step, sums)


def shape_of(folder: Path) -> ModelShape:
    """Sizes of the model of a run's checkpoint, from the teacher that its stage reads."""
    run = next((parent for parent in folder.absolute().parents if (parent / RECIPE_FILE).is_file()), None)
    inputs = folder.absolute().parents[1] / INPUTS_FILE
    teacher = read_json(inputs)["stages"].get("init", "*") if inputs.is_file() else "*"
    shapes = sorted(run.glob(f"*/{teacher}/{SHAPE_FILE}")) if run else []
    if not shapes:
        raise ValueError(
            f"{folder} lies in no run's folder, which has the model's sizes; copy the run as a whole"
        )
    return read_shape(shapes[0].parent)


def _model_of(folder: Path, infos: Mapping[str, TensorInfo]) -> ModelDescription | None:
    """The model whose tensors a checkpoint has, mixers from the tensors; None for the students of stage 1."""
    if any(is_student_key(key) for key in infos):
        return None
    shape = shape_of(folder)
    return ModelDescription(shape, mixers_of({key: info.shape for key, info in infos.items()}, shape), None)
