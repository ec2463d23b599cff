"""Read a Qwen3 or HypeNet folder in Hugging Face layout: configuration, weights, tokenizer files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hypenet_megatron.presets import MixerType, ModelShape
from hypenet_tools.hf_config import read_config
from hypenet_tools.mapping import conversion_plan, hugging_face_shapes, require_names, to_megatron
from hypenet_tools.weights import SafetensorsWeights

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class HFModel:
    """A model folder whose weights agree with its config.

    `tensors` maps Hugging Face names to tensors, read from disk when asked for, in the stored dtype.
    `mixer_types` and `logits_scaling_base` are None for a Qwen3 teacher.
    """

    folder: Path
    shape: ModelShape
    mixer_types: tuple[MixerType, ...] | None
    logits_scaling_base: float | None
    tensors: Mapping[str, Tensor]
    tokenizer_files: tuple[Path, ...]

    def megatron_tensors(self) -> dict[str, Tensor]:
        """All weights under their Megatron names (tensor-parallel size 1)."""
        mixers = self.mixer_types if self.mixer_types is not None else self.shape.teacher_mixers()
        return to_megatron(self.tensors, self.shape, mixers, gated=self.mixer_types is not None)


def read_model_folder(folder: Path) -> HFModel:
    """Open a folder. Every tensor's name and shape is checked against config.json before anything is loaded.

    ValueError, one sentence with the mend, when something is missing, truncated, pickled, unsupported or
    contradictory.
    """
    config_path = folder / "config.json"
    description = read_config(config_path)
    shape, mixer_types = description.shape, description.mixer_types
    weights = SafetensorsWeights(folder)
    _drop_tied_head(weights, config_path, shape)
    plan = conversion_plan(shape, mixer_types or shape.teacher_mixers(), gated=mixer_types is not None)
    expected = hugging_face_shapes(plan)
    require_names(weights, expected, f"the weights of {folder}")
    for name, wanted in expected.items():
        stored = weights.stored[name]
        if stored.shape != wanted:
            raise ValueError(
                f"{stored.file}: tensor {name} has shape {list(stored.shape)} but {config_path.name} calls "
                f"for {list(wanted)}; put the config.json of these weights back"
            )
    tokenizer_files = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    return HFModel(folder, shape, mixer_types, description.logits_scaling_base, weights, tokenizer_files)


def _drop_tied_head(weights: SafetensorsWeights, config_path: Path, shape: ModelShape) -> None:
    """Published tied models (Qwen3-1.7B, for one) store the head although it equals the embedding."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not shape.tied_embeddings or head not in weights:
        return
    if embedding in weights and not weights.same_content(head, embedding):
        raise ValueError(
            f"{weights.stored[head].file}: {head} differs from {embedding} although {config_path.name} ties "
            "them; set tie_word_embeddings to false to keep the head"
        )
    weights.drop(head)
