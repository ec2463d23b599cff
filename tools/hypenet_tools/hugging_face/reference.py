"""HypeNet folders as the reference implementation writes them, released or in the middle of training.

The reference's training checkpoints wrap models, which changes the names:

    stage 1  model.model.layers.N.self_attn.teacher_layer.* and .student_layer.* (one attention, one recurrent mixer)
    stage 2  teacher_model.* (the entire teacher) and student_model.model.* (the hybrid)

From a stage-1 checkpoint, attention layers take the teacher's mixer and the others the student's, as in the reference's
own stage 2. The attention has no gate yet, so gates are drawn as in stage 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypenet_megatron.mixers.spec import normal
from hypenet_megatron.presets import ATTENTION
from hypenet_tools.hugging_face.config import ModelDescription, read_config
from hypenet_tools.hugging_face.initialise import FreshTensors
from hypenet_tools.hugging_face.mapping import HF_LAYER
from hypenet_tools.hugging_face.mapping_views import megatron_view
from hypenet_tools.hugging_face.weights import EMBEDDING, HEAD, SafetensorsWeights
from sharded_tensors.views import AssembledTensors, TensorView

_TEACHER, _STUDENT = "teacher_layer.", "student_layer."


def read_reference_folder(folder: Path, seed: int) -> tuple[ModelDescription, TensorView, list[int]]:
    """Open a HypeNet folder (config.json of type hypenet, safetensors). ValueError names what does not fit.

    Returns the model, its tensors under Megatron names, and the attention layers whose gates were drawn.
    """
    description = read_config(folder / "config.json")
    mixers = description.mixer_types
    if mixers is None:
        raise ValueError(
            f"{folder / 'config.json'} describes a Qwen3, not a HypeNet; leave --from-hypenet out"
        )
    weights = SafetensorsWeights(folder)
    view = AssembledTensors()
    released = {stored: released_name(stored, mixers) for stored in weights}
    for stored, name in released.items():
        if name == HEAD and description.shape.tied_embeddings:  # the reference stores it even then
            weights.require_tied(stored, next((s for s, n in released.items() if n == EMBEDDING), EMBEDDING))
        elif name is not None:
            if name in view:
                raise ValueError(f"{weights.files[stored]}: {stored} and another tensor are both {name}")
            view.take(weights, stored, name)
    missing = []
    if any(_TEACHER in stored for stored in weights):
        missing = [
            layer
            for layer, mixer in enumerate(mixers)
            if mixer == ATTENTION and _gate(layer) not in view and _query(layer) in view
        ]
    infos = {_gate(layer): view.infos[_query(layer)] for layer in missing}
    gates = FreshTensors(seed, dict.fromkeys(infos, normal("gate")), infos)
    for name in gates:
        view.take(gates, name)
    return description, megatron_view(view, description.plan, f"the weights of {folder}"), missing


def released_name(stored: str, mixers: Sequence[str]) -> str | None:
    """The name of a stored tensor in the released layout; None if the hybrid does not have it."""
    if stored.startswith("teacher_model."):
        return None
    name = stored.removeprefix("student_model.")
    for wrapped, bare in (("model.model.", "model."), ("model.lm_head.", "lm_head.")):
        if name.startswith(wrapped):
            name = bare + name.removeprefix(wrapped)
    if _TEACHER in name or _STUDENT in name:
        attention = {str(layer) for layer, mixer in enumerate(mixers) if mixer == ATTENTION}
        kept = _TEACHER if name.split(".")[2] in attention else _STUDENT
        if kept not in name:
            return None
        name = name.replace(kept, "", 1)
    return name


def _gate(layer: int) -> str:
    return HF_LAYER.format(layer=layer) + "self_attn.o_gate.weight"


def _query(layer: int) -> str:
    return HF_LAYER.format(layer=layer) + "self_attn.q_proj.weight"
