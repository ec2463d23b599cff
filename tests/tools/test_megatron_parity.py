"""Converted weights mean the same model on both sides: transformers, Megatron, and the exported code."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hypenet_megatron.alignment import Route
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel
from hypenet_megatron.runtime import model_parallel
from hypenet_tools.hugging_face.folder import read_model_folder
from hypenet_tools.hugging_face.initialise import STUDENT
from hypenet_tools.hugging_face.weights import SafetensorsWeights
from hypenet_tools.release import write_hf_folder
from tests.support.conversions import hybrid_tensors, student_tensors
from tests.support.reference_model import hypenet_forward
from tests.support.tiny_models import HYBRID, TINY


@pytest.fixture(autouse=True)
def megatron_cpu():
    with model_parallel(seed=1) as device:
        yield device


@pytest.fixture
def ids():
    return torch.randint(TINY.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))


def megatron_model(tensors, shape, mixers, **options):
    model = DecoderModel(DecoderConfig.from_shape(shape, mixers, **options)).eval()
    model.load_state_dict(tensors)
    return model


@torch.no_grad()
def megatron_logits(model, ids):
    return model.logits(model(ids)).transpose(0, 1)


@pytest.mark.parametrize("tied", [True, False])
def test_teacher_equals_transformers(tmp_path, ids, tied):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        initializer_range=0.15,
    )
    judge = Qwen3ForCausalLM(config).eval()
    judge.save_pretrained(tmp_path)
    teacher = read_model_folder(tmp_path)
    model = megatron_model(
        dict(teacher.megatron_view()), teacher.description.shape, teacher.description.shape.teacher_mixers()
    )
    with torch.no_grad():
        expected = judge(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(megatron_logits(model, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [TINY, replace(TINY, tied_embeddings=False), replace(TINY, query_heads=6, kv_groups=3)]
)
def test_hybrid_equals_the_reference_and_the_export(random_tensors, tokenizer_folder, tmp_path, ids, shape):
    tensors = random_tensors(shape, HYBRID)
    write_hf_folder(
        tmp_path / "export",
        tensors,
        shape,
        HYBRID,
        logits_scaling_base=9.0,
        tokenizer_folder=tokenizer_folder,
        dtype=torch.float32,
        model_card="",
    )
    model = megatron_model(tensors, shape, HYBRID, logits_scaling_base=9.0)
    found = megatron_logits(model, ids)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    expected = hypenet_forward(SafetensorsWeights(tmp_path / "export"), config, ids)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(export(ids).logits, found, rtol=0, atol=1e-5)


@torch.no_grad()
def test_aligned_model_takes_the_students_and_gives_them_to_the_hybrid(random_tensors, ids):
    teacher = random_tensors(TINY, TINY.teacher_mixers())
    students = student_tensors(teacher, TINY, seed=2)
    config = DecoderConfig.from_shape(TINY, TINY.teacher_mixers())
    aligned = DecoderModel(config, student="lightning").eval()
    own = {name for name, _ in aligned.named_parameters() if f".{STUDENT}" in name}
    assert own == students.keys()
    renamed = {name.replace(".self_attention.", ".self_attention.teacher."): t for name, t in teacher.items()}
    aligned.load_state_dict({**renamed, **students})

    hybrid = hybrid_tensors(teacher, aligned.state_dict(), TINY, (), seed=2)
    all_lightning = megatron_model(hybrid, TINY, TINY.hybrid_mixers((), "lightning"))
    aligned.set_route(Route.STUDENT)
    assert megatron_logits(aligned, ids).equal(megatron_logits(all_lightning, ids))
