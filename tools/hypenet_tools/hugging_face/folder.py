"""Reads a Qwen3 or HypeNet folder in Hugging Face layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hypenet_megatron.presets import ModelShape
from hypenet_tools.hugging_face.config import ModelDescription, read_config
from hypenet_tools.hugging_face.mapping import hugging_face_shapes, require_names
from hypenet_tools.hugging_face.mapping_views import megatron_view
from hypenet_tools.hugging_face.weights import SafetensorsWeights
from sharded_tensors.views import TensorView


@dataclass(frozen=True)
class HFModel:
    """A model folder whose weights agree with its config.

    `tensors` maps Hugging Face names to tensors, read from disk on demand, in the stored dtype.
    """

    folder: Path
    description: ModelDescription
    tensors: SafetensorsWeights

    @property
    def shape(self) -> ModelShape:
        return self.description.shape

    @property
    def mixer_types(self) -> tuple[str, ...] | None:
        """None for a Qwen3 teacher."""
        return self.description.mixer_types

    def megatron_view(self) -> TensorView:
        """All weights under their Megatron names; none is read yet."""
        return megatron_view(self.tensors, self.description.plan, f"the weights of {self.folder}")


def read_model_folder(folder: Path, *, check_finite: bool = True) -> HFModel:
    """Open a folder. Every tensor's name and shape is checked against config.json before anything is loaded.

    ValueError, one sentence with the fix, when something is missing, truncated, pickled, unsupported or
    contradictory; with `check_finite` also when a tensor that is read holds NaN or infinity.
    """
    config_path = folder / "config.json"
    description = read_config(config_path)
    weights = SafetensorsWeights(folder, check_finite=check_finite)
    _drop_tied_head(weights, config_path, description.shape)
    expected = hugging_face_shapes(description.plan)
    require_names(weights, expected, f"the weights of {folder}")
    for name, wanted in expected.items():
        if weights.infos[name].shape != wanted:
            raise ValueError(
                f"{weights.files[name]}: tensor {name} has shape {list(weights.infos[name].shape)} but "
                f"{config_path.name} calls for {list(wanted)}; put the config.json of these weights back"
            )
    return HFModel(folder, description, weights)


def _drop_tied_head(weights: SafetensorsWeights, config_path: Path, shape: ModelShape) -> None:
    """Some published tied models (Qwen3-1.7B) store the head although it equals the embedding."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not shape.tied_embeddings or head not in weights:
        return
    if embedding in weights and not weights.same_content(head, embedding):
        raise ValueError(
            f"{weights.files[head]}: {head} differs from {embedding} although {config_path.name} ties "
            "them; set tie_word_embeddings to false to keep the head"
        )
    weights.drop(head)
