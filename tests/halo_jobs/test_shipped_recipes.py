"""Every shipped recipe runs to its end: two steps of each training, small numbers, a tiny teacher."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from durable_files import read_json
from halo_cluster.stage_id import StageId
from halo_jobs.recipe import SHIPPED_RECIPES, load_recipe
from halo_jobs.stages.context import StageContext
from halo_jobs.work import StageInputs
from tests.halo_jobs.conftest import write_teacher
from tests.support.halo import checked_halo, set_options

ROOT = Path(__file__).parents[2]
RECIPES = [*sorted(SHIPPED_RECIPES.glob("*.yaml")), *sorted((ROOT / "examples").glob("**/*.yaml"))]
SMALL_TRAINING = {
    "steps": 2,
    "context_length": 128,
    "global_batch": 2,
    "micro_batch": 1,
    "warmup_steps": 1,
    "checkpoint_every": 1,
}
SMALL: dict[str, dict[str, Any]] = {
    "pretrain": SMALL_TRAINING,
    "align": SMALL_TRAINING,
    "distill": SMALL_TRAINING,
    "finetune": SMALL_TRAINING,
    "select": {"context_length": 128, "items": 2},
    "calibrate": {"candidates": [20, 50], "context_length": 96, "windows": 1},
    "evaluate": {"contexts": [128, 160], "depths": [0.5], "needle_items": 1, "suite_items": 2},
    "shape": {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "query_heads": 2,
        "kv_groups": 1,
        "head_dim": 16,
    },
    "corpus": {"held_out_share": 0.3, "recall_episodes": 40},
}


def _made_small(recipe: dict[str, Any], corpus: Path, teacher: Path, tokenizer: Path) -> dict[str, Any]:
    """Its keys, with small numbers for those that it has; and our text, teacher and tokenizer."""
    small = {
        key: {name: SMALL.get(key, {}).get(name, value) for name, value in content.items()}
        if isinstance(content, dict)
        else content
        for key, content in recipe.items()
    }
    for key in small["corpus"].keys() & {"train", "held_out"}:
        small["corpus"][key] = [str(corpus)]
    small |= {"teacher": str(teacher)} if "teacher" in small else {"tokenizer": str(tokenizer)}
    return small


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_runs_to_its_end(path, tiny_corpus, tiny_tokenizer, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    layers = recipe.get("select", {}).get("attention_layers", [])
    teacher = write_teacher(tmp_path / "teacher", tiny_tokenizer, layers=max([3, *layers]) + 1)
    small = _made_small(recipe, tiny_corpus, teacher, tiny_tokenizer)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    said = checked_halo("run", tmp_path / "small.yaml", "--runs", tmp_path / "runs")
    run = tmp_path / "runs" / recipe["name"]
    assert (run / "report.html").exists() and "report.html" in said
    trained = {path.parent.parent.name.partition(".")[0]: path for path in run.glob("*/*/metrics.jsonl")}
    sections = recipe.keys() & {"pretrain", "align", "distill", "finetune"}
    assert trained.keys() == sections
    for section in sections:
        losses = [json.loads(line)["loss"] for line in trained[section].read_text().splitlines()]
        assert len(losses) == 2 and min(losses) > 0
    (config,) = run.glob("export/*/*/config.json")
    exported = json.loads(config.read_text())
    assert exported["num_hidden_layers"] == (4 if "shape" in recipe else max([3, *layers]) + 1)
    if layers:
        kept = [number for number, kind in enumerate(exported["mixer_types"]) if kind == "attn"]
        assert kept == layers


DEMO = (
    "align.steps=4",
    "align.warmup_steps=1",
    "align.context_length=128",
    "select.context_length=128",
    "distill.context_length=128",
    "distill.steps=2",
    "distill.warmup_steps=1",
    "finetune.steps=2",
    "finetune.context_length=256",
    "finetune.warmup_steps=1",
    "select.items=2",
    "select.baselines=[]",
    "calibrate.context_length=256",
    "calibrate.windows=1",
    "evaluate.contexts=[128]",
    "evaluate.depths=[0.5]",
    "evaluate.needle_items=1",
    "evaluate.suite_items=2",
)


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory) -> Path:
    """The run folder of the demo: its own teacher and text, few and short steps."""
    runs = tmp_path_factory.mktemp("demo")
    checked_halo("demo", "--runs", runs, *set_options(*DEMO))
    return runs / "demo"


def _sources(run: Path, stage: str) -> Counter[str]:
    """Where the first 100 samples of a training stage come from."""
    (path,) = run.glob(f"{stage}/*/INPUTS.json")
    inputs = StageInputs(**read_json(path))
    recipe = load_recipe(path.parent / "attempt.1" / "recipe.yaml")
    folders = {StageId.parse(name): next(run.glob(f"{name}/*/DONE.json")).parent for name in inputs.stages}
    context = StageContext(
        recipe, path.parent, folders, inputs, console=Console(quiet=True), device=torch.device("cpu"), attempt=None
    )
    sampler = context.sampler(getattr(recipe, inputs.id.kind))
    return Counter(sampler.window(sample).source for sample in range(100))


def test_recall_episodes_have_the_share_of_the_recipe(small_demo):
    assert _sources(small_demo, "align") == {"train": 50, "recall": 50}
    assert _sources(small_demo, "distill.hybrid") == {"train": 15, "recall": 85}
    assert _sources(small_demo, "finetune.hybrid") == {"train": 20, "recall": 80}


def test_demo_learns_as_it_always_did(small_demo):
    """Recorded losses. A change of theirs is a change of the demo's data, model or optimizer, which has to be meant."""
    found = {
        stage: [
            json.loads(line)["loss"]
            for path in small_demo.glob(f"{stage}/*/metrics.jsonl")
            for line in path.read_text().splitlines()
        ]
        for stage in ("align", "distill.hybrid", "finetune.hybrid")
    }
    assert found == {stage: pytest.approx(losses, rel=0.02) for stage, losses in DEMO_LOSSES.items()}


DEMO_LOSSES = {
    "align": [0.1600, 0.1537, 0.08038, 0.05796],
    "distill.hybrid": [7.861, 5.419],
    "finetune.hybrid": [13.364, 13.366],
}
