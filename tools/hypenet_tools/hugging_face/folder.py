"""Reads a Qwen3 or HypeNet folder in Hugging Face layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hypenet_tools.hugging_face.config import ModelDescription, read_config
from hypenet_tools.hugging_face.mapping import hugging_face_shapes
from hypenet_tools.hugging_face.mapping_views import megatron_view, require_shapes
from hypenet_tools.hugging_face.weights import EMBEDDING, HEAD, SafetensorsWeights
from sharded_tensors.views import TensorView


@dataclass(frozen=True)
class HFModel:
    """A model folder whose weights agree with its config.

    `tensors` maps Hugging Face names to tensors, read from disk on demand, in the stored dtype.
    """

    folder: Path
    description: ModelDescription
    tensors: SafetensorsWeights

    def megatron_view(self) -> TensorView:
        """All weights under their Megatron names; none is read yet."""
        return megatron_view(self.tensors, self.description.plan, f"the weights of {self.folder}")


def read_model_folder(folder: Path, *, check_finite: bool = True) -> HFModel:
    """Open a folder. Every tensor's name and shape is checked against config.json before anything is loaded.

    ValueError, one sentence with the fix, when something is missing, truncated, pickled, unsupported or
    contradictory; with `check_finite` also when a tensor that is read holds NaN or infinity.
    """
    description = read_config(folder / "config.json")
    weights = SafetensorsWeights(folder, check_finite=check_finite)
    if description.shape.tied_embeddings and HEAD in weights:  # stored by some published tied models (Qwen3-1.7B)
        weights.require_tied(HEAD, EMBEDDING)
        weights.drop(HEAD)
    require_shapes(weights, hugging_face_shapes(description.plan), f"the weights of {folder}")
    return HFModel(folder, description, weights)
