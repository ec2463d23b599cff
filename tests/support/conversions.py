"""Conversions of tensors in memory, through the views that the product converts files with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from hypenet_megatron.presets import ModelShape
from hypenet_tools.hugging_face.initialise import hybrid_of, students_of
from hypenet_tools.hugging_face.mapping import conversion_plan
from hypenet_tools.hugging_face.mapping_views import hugging_face_view, megatron_view
from sharded_tensors.views import as_view

STUDENT = "lightning"


def to_megatron(
    hf_tensors: Mapping[str, Tensor], shape: ModelShape, mixers: Sequence[str]
) -> dict[str, Tensor]:
    plan = conversion_plan(shape, mixers)
    return dict(megatron_view(as_view(hf_tensors), plan, f"the Hugging Face weights of {shape.name}"))


def to_hugging_face(
    megatron_tensors: Mapping[str, Tensor], shape: ModelShape, mixers: Sequence[str]
) -> dict[str, Tensor]:
    plan = conversion_plan(shape, mixers)
    return dict(hugging_face_view(as_view(megatron_tensors), plan, f"the Megatron weights of {shape.name}"))


def student_tensors(
    teacher: Mapping[str, Tensor], shape: ModelShape, seed: int, student: str = STUDENT
) -> dict[str, Tensor]:
    return dict(students_of(as_view(teacher), shape, student, seed))


def hybrid_tensors(
    teacher: Mapping[str, Tensor],
    students: Mapping[str, Tensor],
    shape: ModelShape,
    attention_layers: Collection[int],
    seed: int,
    student: str = STUDENT,
) -> dict[str, Tensor]:
    mixers = shape.hybrid_mixers(attention_layers, student)
    return dict(hybrid_of(as_view(teacher), as_view(students), shape, mixers, seed))
