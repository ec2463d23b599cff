"""HALO stage 0: student mixers and hybrids made from a teacher's weights, as views of them.

Copied from the teacher: q, k, v, output projection, q/k norms (k and v heads are cloned for Lightning
layers, which have one per query head). New: output gates, N(0, 0.02), and Lightning's output norm, ones.
Gates depend on (seed, layer) alone, whatever the order, the dtype or the other layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from hypenet_megatron.presets import ModelShape
from hypenet_tools.hugging_face.mapping import (
    HF_LAYER,
    MEGATRON_LAYER,
    conversion_plan,
    megatron_shapes,
    require_names,
)
from hypenet_tools.hugging_face.mapping_views import hugging_face_view, megatron_view
from sharded_tensors.views import AssembledTensors, Run, TensorInfo, TensorView, as_view, blocks

GATE_STANDARD_DEVIATION = 0.02
MIXER = "self_attention."
STUDENT = "self_attention.student."


def gate_rows(shape: ModelShape, layer: int, seed: int) -> Tensor:
    """A fresh output gate [query_heads, head_dim, hidden_size], fp32, on the CPU."""
    digest = hashlib.sha256(f"gate {seed} {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    size = (shape.query_heads, shape.head_dim, shape.hidden_size)
    return torch.randn(size, generator=generator) * GATE_STANDARD_DEVIATION


class NewTensors(TensorView):
    """What the teacher does not have: "gate.<layer>" for every layer and "ones". One gate at a time is in memory."""

    def __init__(self, shape: ModelShape, seed: int, dtypes: Mapping[int, torch.dtype]) -> None:
        channels = shape.query_heads * shape.head_dim
        self.shape, self.seed = shape, seed
        self.infos = {
            f"gate.{layer}": TensorInfo((channels, shape.hidden_size), dtype)
            for layer, dtype in dtypes.items()
        } | {f"ones.{layer}": TensorInfo((channels,), dtype) for layer, dtype in dtypes.items()}
        self._latest: tuple[str, Tensor] | None = None

    def rows(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        kind, layer = name.split(".")
        if kind == "ones":
            yield torch.ones(stop - start, 1, dtype=self.infos[name].dtype)
            return
        if self._latest is None or self._latest[0] != name:
            gate = gate_rows(self.shape, int(layer), self.seed).flatten(0, 1)
            self._latest = name, gate.to(self.infos[name].dtype)
        yield from blocks(self._latest[1][start:stop])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_latest": None}


def initial_hybrid(
    teacher: TensorView, shape: ModelShape, attention_layers: Collection[int], seed: int
) -> TensorView:
    """The hybrid of stage 0 under Megatron names, from the teacher's Megatron tensors (or a view of them)."""
    mixers = shape.hybrid_mixers(attention_layers)
    source = hugging_face_view(
        teacher, conversion_plan(shape, shape.teacher_mixers(), gated=False), f"the teacher {shape.name}"
    )
    dtypes = {
        layer: source.infos[HF_LAYER.format(layer=layer) + "self_attn.q_proj.weight"].dtype
        for layer in range(shape.num_layers)
    }
    new = NewTensors(shape, seed, dtypes)
    hybrid = AssembledTensors()
    for name in source:
        if ".k_proj." in name or ".v_proj." in name:
            layer = int(name.split(".")[2])
            copies = shape.queries_per_group if mixers[layer] == "lightning" else 1
            _clone_heads(hybrid, source, name, shape, copies)
        else:
            hybrid.take(source, name)
    for layer, mixer in enumerate(mixers):
        prefix = HF_LAYER.format(layer=layer) + "self_attn."
        hybrid.take(new, f"gate.{layer}", prefix + ("o_gate.weight" if mixer == "attn" else "z_proj.weight"))
        if mixer == "lightning":
            hybrid.take(new, f"ones.{layer}", prefix + "o_norm.weight")
    return megatron_view(
        hybrid, conversion_plan(shape, mixers, gated=True), f"the hybrid made of teacher {shape.name}"
    )


def _clone_heads(
    hybrid: AssembledTensors, source: TensorView, name: str, shape: ModelShape, copies: int
) -> None:
    """Add key or value heads of the teacher, each `copies` times: query head h has those of group h // copies."""
    info = source.infos[name]
    runs = [
        Run(source, name, group * shape.head_dim, (group + 1) * shape.head_dim)
        for group in range(shape.kv_groups)
        for _ in range(copies)
    ]
    hybrid.add(name, TensorInfo((info.shape[0] * copies, info.shape[1]), info.dtype), runs)


def students_of(teacher: TensorView, shape: ModelShape, seed: int) -> TensorView:
    """Students of all layers, named as in the stage-1 model: decoder.layers.N.self_attention.student.*."""
    all_lightning = initial_hybrid(teacher, shape, (), seed)
    students = AssembledTensors()
    for name in all_lightning:
        if f".{MIXER}" in name:
            students.take(all_lightning, name, name.replace(MIXER, STUDENT, 1))
    return students


def hybrid_of(
    teacher: TensorView,
    students: TensorView,
    shape: ModelShape,
    attention_layers: Collection[int],
    seed: int,
) -> TensorView:
    """The stage-2 hybrid: the teacher with aligned students as mixers except in `attention_layers` (0-based).

    `students` holds decoder.layers.N.self_attention.student.* for (at least) every other layer; a whole stage-1
    model will do.
    """
    mixers = shape.hybrid_mixers(attention_layers)
    expected = megatron_shapes(conversion_plan(shape, mixers, gated=True))
    start = initial_hybrid(teacher, shape, attention_layers, seed)
    hybrid = AssembledTensors()
    for name in expected:
        layer = _layer_of(name)
        if layer is None or mixers[layer] == "attn" or f".{MIXER}" not in name:
            hybrid.take(start, name)
        elif (student := name.replace(MIXER, STUDENT, 1)) in students:
            hybrid.take(students, student, name)
    require_names(hybrid, expected, f"the hybrid made of teacher {shape.name} and its students")
    for name, wanted in expected.items():
        if hybrid.infos[name].shape != wanted:
            raise ValueError(
                f"tensor {name} of the hybrid has shape {list(hybrid.infos[name].shape)} where {shape.name} calls "
                f"for {list(wanted)}; align students of this teacher"
            )
    return hybrid


def _layer_of(name: str) -> int | None:
    head = MEGATRON_LAYER.split("{")[0]
    return int(name.removeprefix(head).split(".")[0]) if name.startswith(head) else None


def student_tensors(teacher: Mapping[str, Tensor], shape: ModelShape, seed: int) -> dict[str, Tensor]:
    """`students_of` tensors in memory."""
    return dict(students_of(as_view(teacher), shape, seed))


def hybrid_tensors(
    teacher: Mapping[str, Tensor],
    students: Mapping[str, Tensor],
    shape: ModelShape,
    attention_layers: Collection[int],
    seed: int,
) -> dict[str, Tensor]:
    """`hybrid_of` tensors in memory."""
    return dict(hybrid_of(as_view(teacher), as_view(students), shape, attention_layers, seed))
