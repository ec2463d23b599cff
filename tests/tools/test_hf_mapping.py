"""The mapping table in both directions, and its strictness."""

from dataclasses import replace

import pytest
import torch

from hypenet_tools.hugging_face.mapping import conversion_plan, megatron_shapes
from tests.support.conversions import to_hugging_face, to_megatron
from tests.support.tiny_models import HYBRID, TINY

TEACHER = TINY.teacher_mixers()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixers", [TEACHER, HYBRID, ("lightning",) * 4])
def test_round_trip_is_bit_identical(random_tensors, tied, mixers):
    shape = replace(TINY, tied_embeddings=tied)
    assert shape.head_dim != shape.hidden_size // shape.query_heads
    megatron = random_tensors(shape, mixers)
    hf = to_hugging_face(megatron, shape, mixers)
    assert ("lm_head.weight" in hf) is not tied
    back = to_megatron(hf, shape, mixers)
    assert back.keys() == megatron.keys()
    assert all(back[name].equal(megatron[name]) for name in megatron)


def test_fused_rows_are_interleaved_per_key_value_group(random_tensors):
    hf = to_hugging_face(random_tensors(TINY, HYBRID), TINY, HYBRID)
    megatron = to_megatron(hf, TINY, HYBRID)
    rows = {
        name: hf[f"model.layers.1.self_attn.{name}.weight"]
        for name in ("q_proj", "o_gate", "k_proj", "v_proj")
    }
    second_group = torch.cat(
        [rows["q_proj"][32:64], rows["o_gate"][32:64], rows["k_proj"][16:32], rows["v_proj"][16:32]]
    )
    assert megatron["decoder.layers.1.self_attention.linear_qkv.weight"][96:].equal(second_group)
    rows = {
        name: hf[f"model.layers.0.self_attn.{name}.weight"]
        for name in ("q_proj", "z_proj", "k_proj", "v_proj")
    }
    third_head = torch.cat([part[32:48] for part in rows.values()])
    assert megatron["decoder.layers.0.self_attention.linear_qkv.weight"][128:192].equal(third_head)
    gate, up = hf["model.layers.2.mlp.gate_proj.weight"], hf["model.layers.2.mlp.up_proj.weight"]
    assert megatron["decoder.layers.2.mlp.linear_fc1.weight"].equal(torch.cat([gate, up]))


def test_plan_agrees_with_the_tensors_it_makes(random_tensors):
    hf = to_hugging_face(random_tensors(TINY, HYBRID), TINY, HYBRID)
    shapes = megatron_shapes(conversion_plan(TINY, HYBRID))
    assert {
        name: tuple(tensor.shape) for name, tensor in to_megatron(hf, TINY, HYBRID).items()
    } == shapes


def test_missing_tensor_is_named(random_tensors):
    hf = to_hugging_face(random_tensors(TINY, TEACHER), TINY, TEACHER)
    del hf["model.layers.3.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"lack model\.layers\.3\.self_attn\.k_proj\.weight"):
        to_megatron(hf, TINY, TEACHER)


def test_left_over_tensor_is_named(random_tensors):
    megatron = random_tensors(TINY, TEACHER)
    megatron["decoder.layers.0.surplus"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"unexpected decoder\.layers\.0\.surplus"):
        to_hugging_face(megatron, TINY, TEACHER)


def test_untied_weights_do_not_pass_for_tied(random_tensors):
    untied = replace(TINY, tied_embeddings=False)
    hf = to_hugging_face(random_tensors(untied, TEACHER), untied, TEACHER)
    with pytest.raises(ValueError, match=r"unexpected lm_head\.weight"):
        to_megatron(hf, TINY, TEACHER)


def test_wrong_shape_names_tensor_and_both_shapes(random_tensors):
    hf = to_hugging_face(random_tensors(TINY, TEACHER), TINY, TEACHER)
    hf["model.layers.1.self_attn.v_proj.weight"] = torch.zeros(64, 48)
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.v_proj\.weight has shape \[64, 48\].*\[32, 48\]"
    ):
        to_megatron(hf, TINY, TEACHER)


def test_parts_of_different_dtypes_are_refused(random_tensors):
    hf = to_hugging_face(random_tensors(TINY, TEACHER), TINY, TEACHER)
    hf["model.layers.1.mlp.up_proj.weight"] = hf["model.layers.1.mlp.up_proj.weight"].bfloat16()
    with pytest.raises(ValueError, match="different dtypes"):
        to_megatron(hf, TINY, TEACHER)


def test_unknown_mixer_is_named_with_its_nearest():
    with pytest.raises(ValueError, match="there is no mixer 'lightening'; did you mean 'lightning'"):
        conversion_plan(TINY, ("lightening",) * 4)


def test_one_mixer_per_layer():
    with pytest.raises(ValueError, match="4 layers but 3 mixer types"):
        conversion_plan(TINY, HYBRID[:3])
