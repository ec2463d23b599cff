"""Whatever folder a user names: a Hugging Face folder or one of our weights folders, opened alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable_files import FolderManifest, sha256_file
from hypenet_tools.folder_job import require_no_job
from hypenet_tools.hugging_face.aux_files import CHECKSUM_FILE
from hypenet_tools.hugging_face.config import ModelDescription
from hypenet_tools.hugging_face.folder import read_model_folder
from hypenet_tools.hugging_face.mapping_views import hugging_face_view, megatron_view
from hypenet_tools.layout import Layout
from hypenet_tools.weights_folder import SOURCE_FOLDER, WeightsFolder, is_weights_folder
from sharded_tensors.views import TensorView
from sharded_tensors.writer import Advance

HUGGING_FACE, WEIGHTS, TRAINING = "Hugging Face folder", "weights folder", "training checkpoint"


@dataclass(frozen=True)
class OpenedModel:
    """A model on disk. `stored` has the names of the folder itself; `model` is None for a part of a model."""

    folder: Path
    kind: str
    model: ModelDescription | None
    stored: TensorView
    layout: Layout | None
    provenance: Sequence[Mapping[str, Any]]
    checksums: Mapping[str, str]  # file -> SHA-256, as far as the folder has them

    @property
    def whole(self) -> ModelDescription:
        """`model`; ValueError for a part of a model."""
        if self.model is None:
            raise ValueError(
                f"{self.folder} holds a part of a model only; give the model's own weights folder"
            )
        return self.model

    @property
    def companions(self) -> Path:
        """The folder with tokenizer, card and the like."""
        return self.folder if self.kind == HUGGING_FACE else self.folder / SOURCE_FOLDER

    def hugging_face(self) -> TensorView:
        """All tensors under Hugging Face names; ValueError for a part of a model."""
        if self.kind == HUGGING_FACE:
            return self.stored
        return hugging_face_view(self.stored, self.whole.plan, f"the weights of {self.folder}")

    def megatron(self) -> TensorView:
        """All tensors under Megatron names; ValueError for a part of a model."""
        if self.kind == HUGGING_FACE:
            return megatron_view(self.stored, self.whole.plan, f"the weights of {self.folder}")
        return self.stored

    def damaged_files(self, advance: Advance = lambda count: None) -> list[str]:
        """Names of files that are not what the folder's checksums say. Reads all of them."""
        damaged = []
        for name, digest in self.checksums.items():
            path = self.folder / name
            if not path.is_file() or sha256_file(path) != digest:
                damaged.append(name)
            advance(path.stat().st_size if path.is_file() else 0)
        return damaged


def open_model(folder: Path) -> OpenedModel:
    """Open a folder without reading its weights. ValueError says what is wrong with it, or that it is neither kind."""
    require_no_job(folder)
    if is_weights_folder(folder):
        weights = WeightsFolder(folder)
        index = weights.index
        sums = {name: digest for name, (_, digest) in FolderManifest.read(folder).files.items()}
        return OpenedModel(folder, WEIGHTS, index.model, weights, index.layout, index.provenance, sums)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is neither a Hugging Face folder (it has no config.json) nor a weights folder (no weights.json)"
        )
    model = read_model_folder(folder, check_finite=False)
    return OpenedModel(folder, HUGGING_FACE, model.description, model.tensors, None, [], _checksums(folder))


def manifest_digest(folder: Path) -> dict[str, str]:
    """The checksum of a folder's checksums, which stands for all of its content in a provenance."""
    return {"of": FolderManifest.FILE_NAME, "sha256": sha256_file(folder / FolderManifest.FILE_NAME)}


def _checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUM_FILE
    if not path.is_file():
        return {}
    pairs = [line.split("  ", 1) for line in path.read_text().splitlines() if line]
    if any(len(pair) != 2 or Path(pair[1]).name != pair[1] for pair in pairs):
        raise ValueError(f"{path} is damaged: every line is a SHA-256, two blanks and a file of the folder")
    return {name: digest for digest, name in pairs}
