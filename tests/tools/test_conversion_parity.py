"""Converted weights are the same model: transformers' logits, at one process and at TP 2 x PP 2."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel
from hypenet_megatron.presets import QWEN3_SHAPES
from hypenet_megatron.runtime import ParallelLayout, model_parallel
from hypenet_tools.convert import convert_job
from hypenet_tools.export import export_job
from hypenet_tools.folder_job import run_job
from hypenet_tools.layout import FolderLayout
from hypenet_tools.logits import logits
from hypenet_tools.model_weights import load_weights
from hypenet_tools.open_model import open_model
from hypenet_tools.verify import verify
from tests.support.fork_server import run_ranks
from tests.support.tiny_models import TINY, tiny

SETTINGS = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 1e6,
    "initializer_range": 0.15,
}
TENSOR, PIPELINE = 2, 2


def _teacher(folder, tokenizer_folder, tied):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SETTINGS, tie_word_embeddings=tied)).eval()
    model.save_pretrained(folder)
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_teacher_through_the_folder_equals_transformers(tmp_path, tokenizer_folder, tied):
    _teacher(tmp_path / "teacher", tokenizer_folder, tied)
    assert run_job(convert_job(tmp_path / "teacher", tmp_path / "weights", FolderLayout(2, 2)))
    report = verify(open_model(tmp_path / "teacher"), open_model(tmp_path / "weights"))
    assert report["match"], report
    assert report["logits"]["max_difference"] <= 1e-5 < report["logits"]["largest"]
    assert report["logits"]["top_1_agreement"] == 1
    assert report["logits"]["cosine"] > 1 - 1e-6


def _rank_main(rank, folder):
    layout = ParallelLayout(tensor=TENSOR, pipeline=PIPELINE)
    with model_parallel(layout, seed=3), torch.no_grad():
        opened = open_model(folder / "weights")
        config = DecoderConfig.from_shape(
            opened.model.shape, opened.model.shape.teacher_mixers(), **layout.megatron_options()
        )
        model = DecoderModel(config).eval()
        load_weights(folder / "weights", model)
        ids = torch.from_numpy(np.load(folder / "ids.npy"))
        shape = (ids.shape[1], ids.shape[0], config.hidden_size)
        if not model.pre_process:
            hidden = torch.empty(shape)
            dist.recv(hidden, rank - TENSOR)
            model.set_input_tensor(hidden)
        hidden = model(ids)
        if not model.post_process:
            dist.send(hidden.contiguous(), rank + TENSOR)
        else:
            np.save(folder / f"logits-{rank % TENSOR}.npy", model.logits(hidden).transpose(0, 1).numpy())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo ranks on the CPU backend; with CUDA it is off")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_teacher_at_tensor_2_by_pipeline_2_equals_transformers(tmp_path, tokenizer_folder, tied):
    judge = _teacher(tmp_path / "teacher", tokenizer_folder, tied)
    layout = FolderLayout(TENSOR, PIPELINE)
    assert run_job(convert_job(tmp_path / "teacher", tmp_path / "weights", layout, max_shard_bytes=50_000))
    ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "ids.npy", ids.numpy())
    run_ranks(TENSOR * PIPELINE, _rank_main, tmp_path)
    halves = [np.load(tmp_path / f"logits-{rank}.npy") for rank in range(TENSOR)]
    with torch.no_grad():
        expected = judge(ids).logits.numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(np.concatenate(halves, axis=-1), expected, rtol=0, atol=1e-5)


def test_hybrid_of_stage_0_means_the_same_on_both_sides(hf_folder, tmp_path):
    source = hf_folder("source", TINY, dtype=torch.float32)
    assert run_job(convert_job(source, tmp_path / "weights", FolderLayout(2), hybrid="1,3"))
    assert run_job(export_job(open_model(tmp_path / "weights"), tmp_path / "out", logits_scaling_base=9.0))
    report = verify(open_model(tmp_path / "weights"), open_model(tmp_path / "out"))
    assert [entry["what"] for entry in report["model"]] == ["logits_scaling_base"]
    assert report["tensors"]["equal"] == report["tensors"]["compared"]


def test_a_wrong_weight_shows_in_the_logits(hf_folder, tmp_path):
    one = hf_folder("one", TINY, dtype=torch.float32)
    assert run_job(convert_job(one, tmp_path / "weights", FolderLayout()))
    other = hf_folder("other", TINY, dtype=torch.bfloat16)
    report = verify(open_model(other), open_model(tmp_path / "weights"))
    assert not report["match"]
    assert report["logits"]["max_difference"] > 1e-3


def test_mixture_survives_the_way_through_the_folder(tmp_path, tokenizer_folder):
    shape = tiny(QWEN3_SHAPES["qwen3-30b-a3b"])
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        moe_intermediate_size=shape.expert_ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_groups,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        norm_topk_prob=True,
        rope_theta=1e6,
        initializer_range=0.15,
    )
    judge = Qwen3MoeForCausalLM(config).eval()
    judge.save_pretrained(tmp_path / "teacher")
    for path in tokenizer_folder.iterdir():
        (tmp_path / "teacher" / path.name).write_bytes(path.read_bytes())
    assert run_job(convert_job(tmp_path / "teacher", tmp_path / "weights", FolderLayout(2, 2, 2)))
    assert run_job(export_job(open_model(tmp_path / "weights"), tmp_path / "back"))
    report = verify(open_model(tmp_path / "teacher"), open_model(tmp_path / "back"))
    assert report["match"], report
    assert logits(open_model(tmp_path / "weights")).equal(logits(open_model(tmp_path / "back")))
    ids = torch.randint(96, (2, 24))
    with torch.no_grad():
        back = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "back").eval()
        assert back(ids).logits.equal(judge(ids).logits)
