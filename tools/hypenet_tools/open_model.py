"""Opens any model on disk: a Hugging Face folder, a weights folder, or a training checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from durable_files import FolderManifest, sha256_file
from hypenet_tools.folder_job import require_no_job
from hypenet_tools.hugging_face.aux_files import CHECKSUM_FILE
from hypenet_tools.hugging_face.config import ModelDescription
from hypenet_tools.hugging_face.folder import read_model_folder
from hypenet_tools.hugging_face.mapping_views import hugging_face_view, megatron_view
from hypenet_tools.layout import FolderLayout
from sharded_tensors.index import INDEX_FILE, RANDOM_PREFIX, TRAINING_FILE, has_index, is_weight
from sharded_tensors.reader import StoredTensors
from sharded_tensors.views import TensorView

HUGGING_FACE, WEIGHTS, TRAINING = "Hugging Face folder", "weights folder", "training checkpoint"
SOURCE_FOLDER = "source"  # of a weights folder: tokenizer and other files of the model that it was made from


@dataclass(frozen=True)
class FolderMetadata:
    """What the index of a weights folder or training checkpoint says about its tensors.

    `model` is the model that they belong to, None where that is unknown. `complete` is False for a part of it, such
    as the students of the align stage. `provenance` lists how the weights were made, oldest step first.
    """

    model: ModelDescription | None
    complete: bool
    layout: FolderLayout
    provenance: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FolderMetadata:
        model = None if content["model"] is None else ModelDescription.from_json(content["model"])
        return cls(model, content["complete"], FolderLayout(**content["layout"]), content["provenance"])


@dataclass(frozen=True)
class OpenedModel:
    """A model on disk. `stored` has its weights under the names of the folder itself."""

    folder: Path
    kind: str
    metadata: FolderMetadata
    stored: TensorView
    checksums: Mapping[str, str]  # file -> SHA-256, of the files for which the folder has one

    @property
    def model(self) -> ModelDescription:
        """ValueError if the folder holds a part of a model only."""
        if self.metadata.model is None or not self.metadata.complete:
            raise ValueError(f"{self.folder} holds a part of a model only; give the folder of the entire model")
        return self.metadata.model

    @property
    def aux_folder(self) -> Path:
        """The folder with tokenizer, model card and the like."""
        return self.folder if self.kind == HUGGING_FACE else self.folder / SOURCE_FOLDER

    def with_optimizer(self) -> OpenedModel:
        """A training checkpoint with its optimizer state. Random states belong to the ranks that saved them."""
        stored = StoredTensors(self.folder, lambda name: not name.startswith(RANDOM_PREFIX))
        return replace(self, stored=stored)

    def hugging_face(self) -> TensorView:
        """All weights under Hugging Face names; ValueError for a part of a model."""
        if self.kind == HUGGING_FACE:
            return self.stored
        return hugging_face_view(self.stored, self.model.plan, f"the weights of {self.folder}")

    def megatron(self) -> TensorView:
        """All weights under Megatron names; ValueError for a part of a model."""
        if self.kind == HUGGING_FACE:
            return megatron_view(self.stored, self.model.plan, f"the weights of {self.folder}")
        return self.stored

    def damaged_files(self) -> list[str]:
        """Names of files that do not match the folder's checksums. Reads all of them."""
        paths = {name: self.folder / name for name in self.checksums}
        return [
            name
            for name, path in paths.items()
            if not path.is_file() or sha256_file(path) != self.checksums[name]
        ]


def open_model(folder: Path) -> OpenedModel:
    """Open a folder without reading its weights; ValueError says what is wrong with it."""
    require_no_job(folder)
    if has_index(folder):
        return _open_own_folder(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is neither a Hugging Face folder (it has no config.json) nor a weights folder or training "
            f"checkpoint (no {INDEX_FILE})"
        )
    model = read_model_folder(folder, check_finite=False)
    metadata = FolderMetadata(model.description, True, FolderLayout(), [])
    return OpenedModel(folder, HUGGING_FACE, metadata, model.tensors, _checksums(folder))


def _open_own_folder(folder: Path) -> OpenedModel:
    stored = StoredTensors(folder, is_weight)
    try:
        metadata = FolderMetadata.from_json(stored.index.metadata)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / INDEX_FILE} is damaged ({error!r}); restore it or write the folder again"
        ) from None
    sums = {name: digest for name, (_, digest) in stored.manifest.files.items()}
    if not (folder / TRAINING_FILE).is_file():
        return OpenedModel(folder, WEIGHTS, metadata, stored, sums)
    step = {"step": "training", "from": folder.absolute().name, "digest": manifest_digest(folder)}
    metadata = replace(metadata, provenance=[*metadata.provenance, step])
    return OpenedModel(folder, TRAINING, metadata, stored, sums)


def manifest_digest(folder: Path) -> dict[str, str]:
    """The checksum of a folder's manifest, which identifies the content of the folder in a provenance."""
    return {"of": FolderManifest.FILE_NAME, "sha256": sha256_file(folder / FolderManifest.FILE_NAME)}


def _checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUM_FILE
    if not path.is_file():
        return {}
    pairs = [line.split("  ", 1) for line in path.read_text().splitlines() if line]
    if any(len(pair) != 2 or Path(pair[1]).name != pair[1] for pair in pairs):
        raise ValueError(f"{path} is damaged: every line is a SHA-256, two blanks and a file of the folder")
    return {name: digest for digest, name in pairs}
