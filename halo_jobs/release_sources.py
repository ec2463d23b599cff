"""What `halo reshard`, `export`, `verify` and `inspect` may be given: besides model folders, runs and checkpoints."""

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
from hypenet_tools.opened import TRAINING, OpenedModel, manifest_digest, open_model
from hypenet_tools.stored_chunks import ChunkedTensors, StoredChunk
from hypenet_tools.tensors import TensorInfo
from hypenet_tools.weights import DTYPES

OPTIMIZER_PREFIX = "optimizer."


def weights_source(folder: Path, *, weights_only: bool) -> OpenedModel:
    """A model folder, or a training checkpoint without its optimizer. ValueError in one sentence otherwise."""
    if not (folder / INDEX_FILE).is_file():
        return open_model(folder)
    if not weights_only:
        raise ValueError(
            f"{folder} is a training checkpoint, which resumes at any layout as it is; add --weights-only for a "
            "weights folder without the optimizer"
        )
    return _open_checkpoint(folder)


def release_source(folder: Path) -> OpenedModel:
    """As `weights_source`, or a run's folder, which stands for what its export stage has published."""
    if not (folder / RECIPE_FILE).is_file():
        return weights_source(folder, weights_only=True)
    published = sorted(folder.glob("export/*/DONE.json"), key=lambda path: path.stat().st_mtime)
    if not published:
        raise ValueError(
            f"{folder} has not come to its export; finish it with halo run, or name a checkpoint of it"
        )
    (config,) = published[-1].parent.glob("*/config.json")
    return open_model(config.parent)


def _open_checkpoint(folder: Path) -> OpenedModel:
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
