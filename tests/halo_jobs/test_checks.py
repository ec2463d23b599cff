"""What `check_recipe` refuses before the first stage, and that the shipped recipes pass."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from halo_jobs.checks import check_recipe
from halo_jobs.recipe import load_recipe
from hypenet_megatron.presets import ModelShape
from hypenet_tools.hugging_face.mapping import conversion_plan, megatron_shapes
from hypenet_tools.release import write_hf_folder


def _refusal(recipe_file, *settings: str) -> str:
    with pytest.raises(ValueError) as refused:
        check_recipe(load_recipe(recipe_file, settings))
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_good_recipes_pass(tiny_recipe):
    assert check_recipe(tiny_recipe).num_layers == 4
    assert check_recipe(load_recipe(Path("demo"))).num_layers == 8


@pytest.mark.parametrize(
    ("settings", "start", "mend"),
    [
        (["align.context_length=60"], "align with recall_share 0.5: ", "at least 64, not 60; increase it"),
        (["corpus.answer_weight=300"], "align with recall_share 0.5: ", "choose 1 to 255"),
        (["corpus.recall_episodes=0"], "corpus.recall_episodes: ", "or set align.recall_share to 0"),
        (["select.context_length=40"], "select.context_length: niah_single_1 ", "increase it"),
        (
            ["distill.context_length=70"],
            "distill.context_length, at which models are evaluated: niah_single_1 ",
            "increase it",
        ),
        (["evaluate.contexts=[512, 50]"], "evaluate.contexts: niah_single_1 ", "not 50; increase it"),
        (["evaluate.depths=[0.5, 50]"], "evaluate.depths: 50", "between 0 (start) and 1 (end)"),
        (["select.attention_layers=[1, 4]"], "select.attention_layers: ", "choose from 0 to 3"),
        (["select.attention_layers=[1, 1]"], "select.attention_layers: ", "name each once"),
        (["align.context_length=513"], "align.context_length: ", "choose at most 512"),
        (["select.context_length=513"], "select.context_length: ", "choose at most 512"),
        (
            ["layout.tensor=4"],
            "layout: tensor 4 does not divide the 2 query heads of tiny",
            "choose a divisor",
        ),
        (["layout.tensor=2"], "layout: tensor 2 does not divide the 1 kv groups of tiny", "choose a divisor"),
        (["layout.context=4"], "layout: context 4 does not divide the 2 query heads", "choose a divisor"),
        (["layout.sequence_parallel=true"], "layout: sequence_parallel splits", "set tensor to at least 2"),
        (["layout.overlap=true"], "layout: overlap is for", "set distributed_optimizer: true"),
        (["layout.virtual_pipeline=2"], "layout: virtual_pipeline interleaves", "pipeline to at least 2"),
        (["layout.pipeline=3"], "layout: 4 layers cannot be spread over 3 pipeline", "choose a divisor, or"),
        (
            ["layout.pipeline=2", "layout.first_stage_layers=3", "layout.last_stage_layers=2"],
            "layout: 4 layers cannot be spread over 2 pipeline stages of which 2 have 3 and 2",
            "choose a divisor, or",
        ),
        (
            ["layout.pipeline=2", "layout.virtual_pipeline=2", "layout.first_stage_layers=3"],
            "layout: a pipeline stage of 3 layers cannot be cut into 2 chunks",
            "change virtual_pipeline",
        ),
        (
            ["layout.pipeline=2", "layout.pipeline_layout=Ett|xtL"],
            "layout: pipeline_layout 'Ett|xtL' is not Megatron's notation: ",
            "Invalid layer character",
        ),
        (
            ["layout.pipeline=2", "layout.pipeline_layout=Ett|t|tL"],
            "layout: pipeline_layout 'Ett|t|tL' names 3 chunks, pipeline 2 x virtual_pipeline 1 makes 2",
            "separate them by",
        ),
        (
            ["layout.pipeline=2", "layout.pipeline_layout=Etttt|L"],
            "layout: pipeline_layout 'Etttt|L' should begin with E",
            "at least one in every chunk",
        ),
        (
            ["layout.pipeline=2", "layout.processes=3"],
            "layout: 3 processes cannot be shared out",
            "use a multiple of that",
        ),
        (
            ["layout.context=2", "layout.processes=2", "finetune.context_length=129"],
            "finetune in this layout: context_length 129 cannot be cut into 2",
            "change one of them",
        ),
        (
            ["layout.processes=4"],
            "align in this layout: global_batch 4 is not a multiple of micro_batch 2 times 4",
            "change one of them",
        ),
        (
            ["layout.pipeline=2", "layout.virtual_pipeline=2", "layout.processes=2", "align.micro_batch=4"],
            "align in this layout: virtual_pipeline needs the 1 micro-batches",
            "change global_batch or micro_batch",
        ),
        (["corpus.train=[nowhere]"], "corpus.train: nowhere does not exist", "correct the path"),
        (["teacher=nowhere"], "teacher: nowhere is not a folder", "correct the path"),
    ],
)
def test_refused(tiny_recipe_file, settings, start, mend):
    message = _refusal(tiny_recipe_file, *settings)
    assert message.startswith(start)
    assert mend in message


@pytest.mark.parametrize(
    ("setting", "package", "mend"),
    [
        ("fan_out.backend=ray", "ray", r"pip install 'hypenet-megatron\[ray\]'"),
        (
            "transformer_impl=transformer_engine",
            "transformer_engine",
            r"pip install 'transformer-engine\[pytorch\]'",
        ),
    ],
)
def test_what_is_not_installed(tiny_recipe_file, monkeypatch, setting, package, mend):
    recipe = load_recipe(tiny_recipe_file, [setting])
    installed = {package: True}
    found, there = importlib.util.find_spec, importlib.util.find_spec("json")

    def find_spec(name, *more):
        return found(name, *more) if name not in installed else there if installed[name] else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    check_recipe(recipe)
    installed[package] = False
    with pytest.raises(ValueError, match=f"{setting.split('=')[0]}: {package} is not installed here; {mend}"):
        check_recipe(recipe)


def test_hybrid_may_outgrow_its_teacher(tiny_recipe_file):
    beyond = [
        "finetune.context_length=1024",
        "calibrate.context_length=2048",
        "evaluate.contexts=[128, 4096]",
    ]
    check_recipe(load_recipe(tiny_recipe_file, beyond))


def test_corpus_without_text(tiny_recipe_file, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    message = _refusal(tiny_recipe_file, f"corpus.held_out=[{tmp_path / 'pictures'}]")
    assert message.startswith("corpus.held_out: ")
    assert "has no .txt, .jsonl, .parquet files" in message


def _broken_teacher(teacher, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(teacher, folder)
    return folder


def test_damaged_weights(tiny_recipe_file, tiny_teacher, tmp_path):
    folder = _broken_teacher(tiny_teacher, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    assert f"teacher: {weights} is truncated" in _refusal(tiny_recipe_file, f"teacher={folder}")


def test_config_that_disagrees_with_the_weights(tiny_recipe_file, tiny_teacher, tmp_path):
    folder = _broken_teacher(tiny_teacher, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    message = _refusal(tiny_recipe_file, f"teacher={folder}")
    assert "tensor model.layers.0.mlp" in message and "has shape [48, 32]" in message


def test_teacher_without_a_tokenizer(tiny_recipe_file, tiny_teacher, tmp_path):
    folder = _broken_teacher(tiny_teacher, tmp_path)
    (folder / "tokenizer.json").unlink()
    assert f"{folder / 'tokenizer.json'} does not exist" in _refusal(tiny_recipe_file, f"teacher={folder}")


def test_tokenizer_larger_than_the_model(tiny_recipe_file, tiny_teacher, tmp_path):
    folder = _broken_teacher(tiny_teacher, tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    extra = {**tokenizer["added_tokens"][0], "id": 600, "content": "<|extra|>"}
    (folder / "tokenizer.json").write_text(
        json.dumps({**tokenizer, "added_tokens": [*tokenizer["added_tokens"], extra]})
    )
    assert "has 601 ids, the model only 600" in _refusal(tiny_recipe_file, f"teacher={folder}")


def test_hybrid_as_teacher(tiny_recipe_file, tiny_tokenizer, tmp_path):
    shape = ModelShape("tiny", 4, 32, 48, 2, 1, 16, 600, tied_embeddings=True, max_positions=512)
    mixers = shape.hybrid_mixers([1], "lightning")
    tensors = {
        name: torch.ones(size)
        for name, size in megatron_shapes(conversion_plan(shape, mixers)).items()
    }
    write_hf_folder(
        tmp_path / "hybrid",
        tensors,
        shape,
        mixers,
        logits_scaling_base=50.0,
        tokenizer_folder=tiny_tokenizer,
        dtype=torch.float32,
        model_card="hybrid",
    )
    assert "is a HypeNet already" in _refusal(tiny_recipe_file, f"teacher={tmp_path / 'hybrid'}")
