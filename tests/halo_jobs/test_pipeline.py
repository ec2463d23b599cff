"""The whole pipeline on a tiny teacher, through the command that users type: result, resume, kill -9, bad input."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from durable_files import read_json
from halo_reports.formatting import decimals
from tests.support.halo import halo, halo_command
from tokenized_data import TokenStore

MAIN_STAGES = [
    "tokenize",
    "recall.128",
    "init",
    "align",
    "select",
    "distill.hybrid",
    "finetune.hybrid",
    "calibrate.hybrid",
    "evaluate.hybrid",
    "evaluate.teacher",
    "export",
]
BASELINE_STAGES = ["distill.uniform", "finetune.uniform", "calibrate.uniform", "evaluate.uniform"]


def _stage_folder(run: Path, stage: str) -> Path:
    (folder,) = (path.parent for path in (run / stage).glob("*/DONE.json"))
    return folder


def _exported_checksums(run: Path) -> str:
    return (_stage_folder(run, "export") / "hypenet" / "SHA256SUMS").read_text()


def _weight_checksum(run: Path) -> str:
    return next(line for line in _exported_checksums(run).splitlines() if "safetensors" in line)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request) -> tuple[Path, Path]:
    """(recipe file, run folder) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("pipeline")
    content = request.getfixturevalue("pipeline_recipe_content")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(content))
    done = halo("run", recipe, "--runs", folder / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe, folder / "runs" / "tiny"


def test_every_stage_is_done_once_and_reported(finished):
    _, run = finished
    for stage in MAIN_STAGES + BASELINE_STAGES:
        done = read_json(_stage_folder(run, stage) / "DONE.json")
        assert done["stage"] == stage
        assert done["outputs"]
        assert [path.name for path in (run / stage).glob("*/attempt.*")] == ["attempt.1"]
    selection = read_json(_stage_folder(run, "select") / "selection.json")
    assert len(selection["attention_layers"]) == 1
    layers = selection["sweep"]["layers"]
    assert len(layers) == 4
    assert all(score["kl"] > 0 for score in layers)


def test_report_shows_the_scores_of_the_evaluations(finished):
    _, run = finished
    html = (run / "report.html").read_text()
    for model in ("hybrid", "teacher"):
        scores = read_json(_stage_folder(run, f"evaluate.{model}") / "evaluation.json")
        assert decimals(scores["perplexity"]) in html, model


def test_finished_run_is_left_alone(finished):
    recipe, run = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("DONE.json")}
    again = halo("run", recipe, "--runs", run.parent)
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("DONE.json")} == before


def test_exported_model_equals_the_trained_one(finished):
    """Logits of the Hugging Face folder against the Megatron weights that the run trained, through transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from halo_training.models import ModelBuilder, read_shape
    from hypenet_megatron.runtime import model_parallel

    _, run = finished
    folder = _stage_folder(run, "export") / "hypenet"
    exported = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = "The river near the harbour feeds the garden again. The engine near the council opens the letter again."
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    layers = read_json(_stage_folder(run, "select") / "selection.json")["attention_layers"]
    base = read_json(_stage_folder(run, "calibrate.hybrid") / "calibration.json")["base"]
    with model_parallel(seed=1) as device, torch.no_grad():
        builder = ModelBuilder(read_shape(_stage_folder(run, "init")), torch.float32, device, student="lightning")
        weights = _stage_folder(run, "finetune.hybrid") / "hybrid"
        model = builder.hybrid(weights, layers, base).eval()
        trained = model.logits(model(input_ids)).transpose(0, 1)
    with torch.no_grad():
        found = exported(input_ids).logits
        padded = torch.nn.functional.pad(input_ids, (5, 0))
        mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
        left_padded = exported(padded, attention_mask=mask).logits[:, 5:]
    assert (found - trained).abs().max() <= 1e-4
    assert (left_padded - trained).abs().max() <= 1e-4


def test_kill_9_at_five_random_moments_changes_nothing(finished, tmp_path):
    recipe, whole = finished
    command = halo_command("run", recipe, "--runs", tmp_path)
    rng = random.Random(os.environ.get("HALO_TEST_SEED", "11"))
    # By stage, not by the clock: on a quiet machine the whole tiny run takes a few seconds.
    for stage in ("align", "select", "distill.hybrid", "finetune.hybrid", "distill.uniform"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / "tiny" / stage).exists():
            assert process.poll() is None, f"ended before {stage} began"
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    final = halo("run", recipe, "--runs", tmp_path)
    assert final.returncode == 0, final.stdout + final.stderr
    assert _weight_checksum(tmp_path / "tiny") == _weight_checksum(whole)
    for stage in ("distill.uniform", "finetune.hybrid"):
        theirs, ours = (
            read_json(_stage_folder(run, stage) / "DONE.json") for run in (whole, tmp_path / "tiny")
        )
        weights = [name for name in ours["outputs"] if name.endswith(".safetensors")]
        assert weights
        assert [ours["outputs"][name] for name in weights] == [theirs["outputs"][name] for name in weights]


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_recipe_file, tmp_path):
    plan = halo("run", tiny_recipe_file, "--runs", tmp_path / "runs", "--dry-run")
    assert plan.returncode == 0, plan.stderr
    for stage in MAIN_STAGES:
        assert stage in plan.stdout
    assert "GiB" in plan.stdout and "min" in plan.stdout
    assert not (tmp_path / "runs").exists()


def _one_sentence(result: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def test_misspelt_key(tiny_recipe_content, tmp_path):
    tiny_recipe_content["align"] = {**tiny_recipe_content["align"], "warmup_step": 3}
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe_content))
    result = halo("run", recipe, "--runs", tmp_path)
    assert result.returncode == 2
    assert "did you mean 'warmup_steps'?" in _one_sentence(result)


def test_truncated_teacher(tiny_recipe_file, tiny_teacher, tmp_path):
    broken = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    result = halo("run", tiny_recipe_file, "--runs", tmp_path, "--set", f"teacher={broken}")
    assert result.returncode == 2
    assert str(weights) in _one_sentence(result)


def test_context_longer_than_the_corpus(tiny_recipe_file, tmp_path):
    settings = ["--set", "calibrate.context_length=500000"]
    result = halo("run", tiny_recipe_file, "--runs", tmp_path, *settings)
    assert result.returncode == 2
    assert "too few for one window of context_length 500000" in _one_sentence(result)
    assert (tmp_path / "tiny" / "finetune.hybrid").exists(), "what was finished before stays"


def test_run_folder_that_cannot_be_made(tiny_recipe_file, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    result = halo("run", tiny_recipe_file, "--runs", tmp_path / "runs")
    assert result.returncode == 1
    assert str(tmp_path / "runs") in _one_sentence(result)


def test_store_of_another_tokenizer_is_refused(finished, tiny_tokenizer):
    from tokenized_data import TokenizerIdentity

    _, run = finished
    other = TokenizerIdentity("other", "0" * 64, 600, 0)
    with pytest.raises(ValueError, match="was made with the tokenizer"):
        TokenStore.open(_stage_folder(run, "tokenize") / "train", expected_tokenizer=other)


def test_recall_episodes_fill_their_windows(finished):
    _, run = finished
    recall = TokenStore.open(_stage_folder(run, "recall.128") / "recall")
    assert recall.has_loss_weights
    assert np.all(np.diff(recall.document_offsets) == 128)
    assert len(recall.document_offsets) == 1 + 12
