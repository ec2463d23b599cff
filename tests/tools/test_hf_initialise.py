"""Stage 0: what is copied, what is cloned, what is random."""

import hashlib
from dataclasses import replace

import pytest
import torch

from tests.support.conversions import hybrid_tensors, student_tensors, to_hugging_face
from tests.support.tiny_models import TINY

GROUPED = replace(TINY, query_heads=6, kv_groups=2)


def as_hugging_face(teacher, shape, attention_layers, seed=3):
    students = student_tensors(teacher, shape, seed)
    hybrid = hybrid_tensors(teacher, students, shape, attention_layers, seed)
    return to_hugging_face(hybrid, shape, shape.hybrid_mixers(attention_layers, "lightning"))


def _gate(shape, layer, seed):
    """As released: drawn from SHA-256 of "gate SEED LAYER"."""
    digest = hashlib.sha256(f"gate {seed} {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn((shape.query_heads * shape.head_dim, shape.hidden_size), generator=generator) * 0.02


@pytest.fixture
def teacher(random_tensors):
    return random_tensors(GROUPED, GROUPED.teacher_mixers())


def test_lightning_heads_are_clones_of_the_teachers_groups(teacher):
    before = to_hugging_face(teacher, GROUPED, GROUPED.teacher_mixers())
    after = as_hugging_face(teacher, GROUPED, (1,))
    for name in ("k_proj", "v_proj"):
        of_teacher = before[f"model.layers.0.self_attn.{name}.weight"].unflatten(0, (2, 16))
        of_student = after[f"model.layers.0.self_attn.{name}.weight"].unflatten(0, (6, 16))
        for head in range(6):
            assert of_student[head].equal(of_teacher[head // 3])
    for name in ("q_proj", "o_proj", "q_norm", "k_norm"):
        assert after[f"model.layers.0.self_attn.{name}.weight"].equal(
            before[f"model.layers.0.self_attn.{name}.weight"]
        )
    assert after["model.layers.0.self_attn.o_norm.weight"].equal(torch.ones(96))


def test_everything_but_the_gates_of_attention_layers_is_the_teachers(teacher):
    before = to_hugging_face(teacher, GROUPED, GROUPED.teacher_mixers())
    after = as_hugging_face(teacher, GROUPED, (0, 1, 2, 3))
    gates = {f"model.layers.{layer}.self_attn.o_gate.weight" for layer in range(4)}
    assert after.keys() - before.keys() == gates
    assert all(after[name].equal(before[name]) for name in before)
    assert after["model.layers.2.self_attn.o_gate.weight"].equal(_gate(GROUPED, layer=2, seed=3))


def test_gates_depend_on_seed_and_layer_alone(teacher):
    one = as_hugging_face(teacher, GROUPED, (1,))["model.layers.2.self_attn.z_proj.weight"]
    other_layout = as_hugging_face(teacher, GROUPED, (0, 3))["model.layers.2.self_attn.z_proj.weight"]
    assert one.equal(other_layout)
    assert not one.equal(as_hugging_face(teacher, GROUPED, (1,))["model.layers.3.self_attn.z_proj.weight"])
    assert not one.equal(
        as_hugging_face(teacher, GROUPED, (1,), seed=4)["model.layers.2.self_attn.z_proj.weight"]
    )


def test_gates_are_normal_with_standard_deviation_0_02():
    gate = _gate(replace(TINY, hidden_size=1024), layer=0, seed=0)
    assert abs(gate.std().item() - 0.02) < 2e-4
    assert abs(gate.mean().item()) < 3e-4


def test_the_teachers_dtype_is_kept(teacher):
    half = {name: tensor.bfloat16() for name, tensor in teacher.items()}
    assert {tensor.dtype for tensor in as_hugging_face(half, GROUPED, (1,)).values()} == {torch.bfloat16}


def test_hybrid_takes_aligned_students_out_of_a_whole_stage_1_state(teacher):
    students = {name: tensor + 1 for name, tensor in student_tensors(teacher, GROUPED, 3).items()}
    stage_1 = {
        **teacher,
        **students,
        "decoder.layers.0.self_attention.teacher.linear_qkv.weight": torch.zeros(1),
    }
    hybrid = hybrid_tensors(teacher, stage_1, GROUPED, (1,), 3)
    aligned = students["decoder.layers.3.self_attention.student.core_attention.o_norm.weight"]
    assert hybrid["decoder.layers.3.self_attention.core_attention.o_norm.weight"].equal(aligned)


def test_missing_student_is_named(teacher):
    students = student_tensors(teacher, GROUPED, 3)
    del students["decoder.layers.2.self_attention.student.linear_qkv.weight"]
    with pytest.raises(ValueError, match=r"lack decoder\.layers\.2\.self_attention\.linear_qkv\.weight"):
        hybrid_tensors(teacher, students, GROUPED, (1,), 3)


def test_students_of_another_teacher_are_refused(teacher):
    students = student_tensors(teacher, GROUPED, 3)
    students["decoder.layers.2.self_attention.student.linear_proj.weight"] = torch.zeros(48, 48)
    with pytest.raises(
        ValueError, match=r"layers\.2\.self_attention\.linear_proj\.weight .* \[48, 48\].*\[48, 96\]"
    ):
        hybrid_tensors(teacher, students, GROUPED, (1,), 3)


def test_attention_layer_beyond_the_model_is_refused(teacher):
    with pytest.raises(ValueError, match=r"\[4\]"):
        hybrid_tensors(teacher, student_tensors(teacher, GROUPED, 3), GROUPED, (4,), 3)
