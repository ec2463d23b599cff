"""A mixer that a test brings goes through the whole pipeline, from `student:` in the recipe to generated text."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from durable_files import read_json
from halo_jobs.checks import check_recipe
from halo_jobs.recipe import load_recipe
from halo_training.models import ModelBuilder, read_shape
from hypenet_megatron.mixers import mixer
from hypenet_megatron.runtime import model_parallel
from hypenet_tools.model_weights import read_weights

ROOT = Path(__file__).parents[2]
STUDENT = "tests.support.gated_delta:SPEC"


def _stage_folder(run: Path, stage: str) -> Path:
    (folder,) = (path.parent for path in (run / stage).glob("*/DONE.json"))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, pipeline_recipe_content) -> Path:
    """The finished run of a conversion whose student is a gated delta rule."""
    content = copy.deepcopy(pipeline_recipe_content)
    training = {"steps": 2, "context_length": 128, "recall_share": 0.0, "checkpoint_every": 2}
    for section in ("align", "distill", "finetune"):
        content[section] = {**content[section], **training}
    content["select"] |= {"context_length": 128, "items": 2, "baselines": []}
    content["calibrate"] = {"candidates": [20], "context_length": 48, "windows": 1}
    content["evaluate"] = {"contexts": [128], "depths": [0.5], "needle_items": 1, "suite_items": 2}
    folder = tmp_path_factory.mktemp("student")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**content, "student": STUDENT}))
    done = subprocess.run(
        [sys.executable, "-m", "halo_jobs.cli", "run", recipe, "--runs", folder / "runs"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def exported(run):
    folder = _stage_folder(run, "export") / "hypenet"
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def _ids(batch=1, length=24):
    return torch.randint(600, (batch, length), generator=torch.Generator().manual_seed(2))


def test_exported_logits_equal_those_of_the_trained_weights(run, exported):
    input_ids = _ids(2)
    layers = read_json(_stage_folder(run, "select") / "selection.json")["attention_layers"]
    base = read_json(_stage_folder(run, "calibrate.hybrid") / "calibration.json")["base"]
    with model_parallel(seed=1) as device, torch.no_grad():
        shape = read_shape(_stage_folder(run, "init"))
        builder = ModelBuilder(shape, torch.float32, device, student=STUDENT)
        model = builder.hybrid(_stage_folder(run, "finetune.hybrid") / "hybrid", layers, base).eval()
        trained = model.logits(model(input_ids)).transpose(0, 1)
        found = exported(input_ids)
        padded = exported(
            torch.nn.functional.pad(input_ids, (5, 0)),
            attention_mask=(torch.arange(29) >= 5).long().expand(2, -1),
        )
    assert trained.std() > 0.1
    assert (found.logits - trained).abs().max() <= 1e-4
    assert (padded.logits[:, 5:] - trained).abs().max() <= 1e-4
    states = found.past_key_values.states
    assert set(states) == set(range(4)) - set(layers)
    assert {tuple(state.shape[1:]) for state in states.values()} == {mixer(STUDENT).state_shape(shape)}
    assert {state.dtype for state in states.values()} == {torch.float32}


def test_greedy_generation_with_a_cache_equals_generation_without(exported):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with_cache = exported.generate(_ids(), **options)
    assert with_cache.equal(exported.generate(_ids(), use_cache=False, **options))
    assert with_cache.shape == (1, 32)


def test_training_changed_every_tensor_of_the_mixer(run):
    """What no gradient reaches would stay at its initial value, and no loss would tell."""
    before = read_weights(_stage_folder(run, "init") / "students")
    after = read_weights(_stage_folder(run, "align") / "students")
    assert {name.split("student.")[1] for name in before} == {
        tensor.name.removeprefix("self_attention.") for tensor in mixer(STUDENT).tensors
    }
    assert [name for name in before if before[name].equal(after[name])] == []


def test_export_names_the_mixer_and_carries_its_code(run):
    folder = _stage_folder(run, "export") / "hypenet"
    config = json.loads((folder / "config.json").read_text())
    assert sorted(set(config["mixer_types"])) == ["attn", "gated-delta"]
    assert (config["gated_delta_use_rope"], config["gated_delta_heads"]) == (True, 2)
    assert not [key for key in config if "lightning" in key]
    assert "The other layers are a gated delta rule" in (folder / "README.md").read_text()
    for path in folder.glob("*.py"):
        assert not re.search(r"^\s*(?:from|import) (?:hypenet|megatron|tests)", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("lightening", "student: there is no mixer 'lightening'; did you mean 'lightning'"),
        ("attn", "student: mixer 'attn' keeps all tokens and cannot be a student"),
        ("nowhere:SPEC", "student: mixer nowhere:SPEC cannot be imported"),
        ("tests.support.gated_delta:_RATES", "tests.support.gated_delta:_RATES is not a MixerSpec"),
    ],
)
def test_student_that_cannot_be(tiny_recipe_file, student, message):
    with pytest.raises(ValueError, match=message):
        check_recipe(load_recipe(tiny_recipe_file, [f"student={student}"]))


def test_mixer_without_context_parallelism_is_refused_in_such_a_layout(tiny_recipe_file):
    overrides = [f"student={STUDENT}", "layout.context=2", "layout.processes=2"]
    with pytest.raises(ValueError, match="gated_delta:SPEC does not support context parallelism"):
        check_recipe(load_recipe(tiny_recipe_file, overrides))
