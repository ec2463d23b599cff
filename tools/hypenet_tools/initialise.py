"""HALO stage 0: student mixers and hybrids made from a teacher's weights. Pure functions on dicts of tensors.

Copied from the teacher: q, k, v, output projection, q/k norms (k and v heads are cloned for Lightning
layers, which have one per query head). New: output gates, N(0, 0.02), and Lightning's output norm, ones.
Gates depend on (seed, layer) alone, whatever the order, the dtype or the other layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from hypenet_megatron.presets import ModelShape
from hypenet_tools.mapping import MEGATRON_LAYER, conversion_plan, megatron_shapes, require_names

GATE_STANDARD_DEVIATION = 0.02
MIXER = "self_attention."
STUDENT = "self_attention.student."


def gate_rows(shape: ModelShape, layer: int, seed: int) -> Tensor:
    """A fresh output gate [query_heads, head_dim, hidden_size], fp32, on the CPU."""
    digest = hashlib.sha256(f"gate {seed} {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    size = (shape.query_heads, shape.head_dim, shape.hidden_size)
    return torch.randn(size, generator=generator) * GATE_STANDARD_DEVIATION


def student_mixer(mixer: Mapping[str, Tensor], shape: ModelShape, layer: int, seed: int) -> dict[str, Tensor]:
    """The Lightning mixer of one layer from the teacher's attention.

    `mixer` and the result are keyed without the layer's prefix ("linear_qkv.weight", ...). Query head h
    takes the key and value of the teacher's group h // (query_heads / kv_groups).
    """
    query, key, value = _heads(mixer["linear_qkv.weight"], shape)
    key, value = (x.repeat_interleave(shape.queries_per_group, dim=0) for x in (key, value))
    gate = gate_rows(shape, layer, seed).to(query.dtype)
    return {
        **_kept(mixer),
        "linear_qkv.weight": torch.cat([query, gate, key, value], dim=1).flatten(0, 1),
        "core_attention.o_norm.weight": query.new_ones(shape.query_heads * shape.head_dim),
    }


def gated_attention(
    mixer: Mapping[str, Tensor], shape: ModelShape, layer: int, seed: int
) -> dict[str, Tensor]:
    """The hybrid's attention of one layer: the teacher's with an output gate. Keyed as in `student_mixer`."""
    query, key, value = _heads(mixer["linear_qkv.weight"], shape)
    gate = gate_rows(shape, layer, seed).to(query.dtype)
    query, gate = (x.unflatten(0, (shape.kv_groups, -1)).flatten(1, 2) for x in (query, gate))
    return {**_kept(mixer), "linear_qkv.weight": torch.cat([query, gate, key, value], dim=1).flatten(0, 1)}


def student_tensors(teacher: Mapping[str, Tensor], shape: ModelShape, seed: int) -> dict[str, Tensor]:
    """Students of all layers, named as in the stage-1 model: decoder.layers.N.self_attention.student.*."""
    _require_teacher(teacher, shape)
    students: dict[str, Tensor] = {}
    for layer in range(shape.num_layers):
        prefix = MEGATRON_LAYER.format(layer=layer)
        mixer = student_mixer(_below(teacher, prefix + MIXER), shape, layer, seed)
        students |= {f"{prefix}{STUDENT}{name}": tensor for name, tensor in mixer.items()}
    return students


def hybrid_tensors(
    teacher: Mapping[str, Tensor],
    students: Mapping[str, Tensor],
    shape: ModelShape,
    attention_layers: Collection[int],
    seed: int,
) -> dict[str, Tensor]:
    """The stage-2 hybrid: the teacher with aligned students as mixers except in `attention_layers` (0-based).

    `students` holds decoder.layers.N.self_attention.student.* for (at least) every other layer; a whole
    stage-1 state dict will do. Tensors are shared with the arguments, not copied, except the fused ones of
    attention layers.
    """
    _require_teacher(teacher, shape)
    mixer_types = shape.hybrid_mixers(list(attention_layers))
    expected = megatron_shapes(conversion_plan(shape, mixer_types, gated=True))
    hybrid = {name: tensor for name, tensor in teacher.items() if f".{MIXER}" not in name}
    for layer, mixer_type in enumerate(mixer_types):
        prefix = MEGATRON_LAYER.format(layer=layer)
        if mixer_type == "attn":
            mixer = gated_attention(_below(teacher, prefix + MIXER), shape, layer, seed)
        else:
            mixer = _below(students, prefix + STUDENT)
        mixer = {prefix + MIXER + name: tensor for name, tensor in mixer.items()}
        # A state dict of Megatron's also holds _extra_state entries, which are no weights.
        hybrid |= {name: tensor for name, tensor in mixer.items() if name in expected}
    require_names(hybrid, expected, f"the hybrid made of teacher {shape.name} and its students")
    for name, wanted in expected.items():
        if tuple(hybrid[name].shape) != wanted:
            raise ValueError(
                f"tensor {name} of the hybrid has shape {list(hybrid[name].shape)} where {shape.name} calls "
                f"for {list(wanted)}; align students of this teacher"
            )
    return hybrid


def _require_teacher(teacher: Mapping[str, Tensor], shape: ModelShape) -> None:
    expected = megatron_shapes(conversion_plan(shape, shape.teacher_mixers(), gated=False))
    require_names(teacher, expected, f"the teacher {shape.name}")


def _heads(linear_qkv: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's fused rows as query [H, dh, d], key [G, dh, d], value [G, dh, d]."""
    rows = [shape.queries_per_group * shape.head_dim, shape.head_dim, shape.head_dim]
    query, key, value = linear_qkv.unflatten(0, (shape.kv_groups, -1)).split(rows, dim=1)
    return query.unflatten(1, (-1, shape.head_dim)).flatten(0, 1), key, value


def _kept(mixer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: mixer[name] for name in ("q_layernorm.weight", "k_layernorm.weight", "linear_proj.weight")}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
