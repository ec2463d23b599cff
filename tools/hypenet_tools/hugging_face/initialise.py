"""HALO stage 0: students and hybrids made from a teacher's weights, as views of them.

How each tensor of a mixer begins is said by its spec (`HuggingFaceTensor.start`): the teacher's tensor, its heads
cloned, or fresh values.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hypenet_megatron.mixers.spec import CLONE_HEADS, Fresh
from hypenet_megatron.presets import ATTENTION, ModelShape
from hypenet_tools.hugging_face.mapping import HF_LAYER, MIXER, conversion_plan, split_name
from hypenet_tools.hugging_face.mapping_views import hugging_face_view, megatron_view, require_shapes
from sharded_tensors.views import AssembledTensors, Run, TensorInfo, TensorView, blocks

STUDENT = "self_attention.student."


class FreshTensors(TensorView):
    """Tensors of `Fresh` values by Hugging Face name (model.layers.N.*). Each thread keeps its latest."""

    def __init__(self, seed: int, starts: Mapping[str, Fresh], infos: Mapping[str, TensorInfo]) -> None:
        self.seed, self.starts, self.infos = seed, starts, infos
        self._latest = threading.local()

    def rows(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        if getattr(self._latest, "name", None) != name:
            fresh, info, layer = self.starts[name], self.infos[name], name.split(".")[2]
            digest = hashlib.sha256(f"{fresh.stream} {self.seed} {layer}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            drawn = fresh.draw(info.shape, generator).to(info.dtype)
            self._latest.name, self._latest.matrix = name, drawn.view(-1, info.columns)
        yield from blocks(self._latest.matrix[start:stop])


def initial_hybrid(teacher: TensorView, shape: ModelShape, mixers: Sequence[str], seed: int) -> TensorView:
    """The model of stage 0 with these mixers under Megatron names, from the teacher's Megatron tensors."""
    source = hugging_face_view(
        teacher, conversion_plan(shape, shape.teacher_mixers()), f"the teacher {shape.name}"
    )
    plan = conversion_plan(shape, mixers)
    infos: dict[str, TensorInfo] = {}
    starts: dict[str, Fresh] = {}
    hybrid = AssembledTensors()
    for entry in plan:
        for (name, size), tensor in zip(entry.parts.items(), entry.sources, strict=True):
            if isinstance(tensor.start, Fresh):
                query = HF_LAYER.format(layer=name.split(".")[2]) + "self_attn.q_proj.weight"
                infos[name], starts[name] = TensorInfo(size, source.infos[query].dtype), tensor.start
            elif tensor.start == CLONE_HEADS:
                copies = size[0] // source.infos[name].rows
                runs = [
                    Run(source, name, group * shape.head_dim, (group + 1) * shape.head_dim)
                    for group in range(shape.kv_groups)
                    for _ in range(copies)
                ]
                hybrid.add(name, TensorInfo(size, source.infos[name].dtype), runs)
            else:
                hybrid.take(source, name)
    fresh = FreshTensors(seed, starts, infos)
    for name in fresh:
        hybrid.take(fresh, name)
    return megatron_view(hybrid, plan, f"the hybrid made of teacher {shape.name}")


def students_of(teacher: TensorView, shape: ModelShape, student: str, seed: int) -> TensorView:
    """Mixers `student` for all layers, named as in the stage-1 model: decoder.layers.N.self_attention.student.*."""
    hybrid = initial_hybrid(teacher, shape, (student,) * shape.num_layers, seed)
    students = AssembledTensors()
    for name in hybrid:
        if split_name(name)[1].startswith(MIXER):
            students.take(hybrid, name, name.replace(MIXER, STUDENT, 1))
    return students


def hybrid_of(
    teacher: TensorView, students: TensorView, shape: ModelShape, mixers: Sequence[str], seed: int
) -> TensorView:
    """The stage-2 hybrid with these mixers: the teacher, with aligned students in all but attention layers.

    `students` holds decoder.layers.N.self_attention.student.* of at least the other layers; a whole stage-1 model will
    do. ValueError names a student tensor that is missing or has another shape.
    """
    initial = initial_hybrid(teacher, shape, mixers, seed)
    hybrid = AssembledTensors()
    for name in initial:
        layer, rest = split_name(name)
        aligned = name.replace(MIXER, STUDENT, 1)
        if layer is None or mixers[layer] == ATTENTION or not rest.startswith(MIXER):
            hybrid.take(initial, name)
        elif aligned in students:
            hybrid.take(students, aligned, name)
    expected = {name: info.shape for name, info in initial.infos.items()}
    require_shapes(hybrid, expected, f"the hybrid made of teacher {shape.name} and its students")
    return hybrid
