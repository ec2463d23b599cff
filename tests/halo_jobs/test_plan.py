"""Which change of a recipe runs which stages again, and what a dry run says about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from halo_cluster import RunFolder
from halo_cluster.stage_id import StageId
from halo_jobs.dry_run import stage_states
from halo_jobs.plan import Plan, make_plan
from halo_jobs.recipe import ConversionRecipe, PretrainRecipe, Recipe, load_recipe
from halo_jobs.sources import Source
from halo_jobs.work import StageInputs, StageWork
from halo_training.settings import Mark, TrainingSection

ALIGN_ON = {"align", "select"}
KINDS = ("distill", "finetune", "calibrate", "evaluate")
VARIANT = {f"{kind}.{variant}" for kind in KINDS for variant in ("hybrid", "uniform")}
FINETUNE_ON = {stage for stage in VARIANT if not stage.startswith("distill")} | {"export"}
DISTILL_ON = VARIANT | {"export"}
CALIBRATE_ON = {stage for stage in VARIANT if stage.startswith(("calibrate", "evaluate"))} | {"export"}
EVALUATE_ON = {"evaluate.hybrid", "evaluate.uniform", "evaluate.teacher", "export"}
ALL_MODELS = {"init", "evaluate.teacher"} | ALIGN_ON | DISTILL_ON
TRAINED = {
    "steps": 7,
    "context_length": 256,
    "global_batch": 8,
    "learning_rate": 0.5,
    "final_learning_rate": 0.25,
    "schedule": "constant",
    "warmup_steps": 3,
    "weight_decay": 0.5,
    "clip_gradient": 0.5,
    "recall_share": 0.25,
}
RECALL = {"align": {"recall.96"}, "distill": {"recall.128"}, "finetune": {"recall.192"}}
AFTER = {"align": ALIGN_ON | DISTILL_ON, "distill": DISTILL_ON, "finetune": FINETUNE_ON}


def _of_training(kind: str) -> dict[str, tuple[Any, set[str]]]:
    changes: dict[str, tuple[Any, set[str]]] = {}
    for key, value in TRAINED.items():
        stages = set(AFTER[kind])
        if key in ("steps", "global_batch", "recall_share"):
            stages |= RECALL[kind]
        if key == "context_length":
            stages |= {"recall.256"} | (EVALUATE_ON if kind == "distill" else set())
        changes[f"{kind}.{key}"] = (value, stages)
    return changes


# By field of a conversion: another value, and the stages that it runs again.
RESULTS: dict[str, tuple[Any, set[str]]] = {
    "seed": (2, {"recall.96", "recall.128", "recall.192"} | ALL_MODELS),
    "precision": ("bf16", ALL_MODELS),
    "student": ("tests.support.gated_delta:SPEC", ALL_MODELS),
    "corpus.held_out_share": (0.2, {"tokenize", "recall.96", "recall.128", "recall.192"} | ALL_MODELS - {"init"}),
    "corpus.recall_episodes": (5, {"recall.96", "recall.128", "recall.192"} | ALIGN_ON | DISTILL_ON),
    "corpus.answer_weight": (9, {"recall.96", "recall.128", "recall.192"} | ALIGN_ON | DISTILL_ON),
    **_of_training("align"),
    **_of_training("distill"),
    **_of_training("finetune"),
    "select.method": ("kl", {"select"} | DISTILL_ON),
    "select.attention_layers": ([1], {"select"} | DISTILL_ON),
    "select.context_length": (96, {"select"} | DISTILL_ON),
    "select.items": (5, {"select"} | DISTILL_ON),
    "calibrate.candidates": ([30.0], CALIBRATE_ON),
    "calibrate.context_length": (64, CALIBRATE_ON),
    "calibrate.windows": (3, CALIBRATE_ON),
    "evaluate.contexts": ([128], EVALUATE_ON),
    "evaluate.depths": ([0.1], EVALUATE_ON),
    "evaluate.needle_items": (3, EVALUATE_ON),
    "evaluate.suite_items": (5, EVALUATE_ON),
    "export.max_shard_megabytes": (7, {"export"}),
}
OPERATIONS: dict[str, Any] = {
    "name": "other",
    "transformer_impl": "transformer_engine",
    "layout.tensor": 2,
    "cluster.nodes": 2,
    "fan_out.workers": 3,
    **{f"{kind}.{key}": value for kind in AFTER for key, value in {
        "micro_batch": 1,
        "checkpoint_every": 5,
        "keep_checkpoints": 3,
        "keep_checkpoint_every": 2,
        "watchdog_seconds": 5.0,
        "spike_factor": 3.0,
    }.items()},
}  # fmt: skip
# `baselines` decides which stages there are; `kind` which recipe it is.
STRUCTURE = {"kind", "select.baselines"}
SOURCES = {"teacher", "corpus.train", "corpus.held_out"}


@pytest.fixture
def settings() -> tuple[str, ...]:
    """Every training has a context length of its own."""
    return ("align.context_length=96", "finetune.context_length=192", "finetune.recall_share=0.5")


def _plan(path: Path, settings: tuple[str, ...]) -> Plan:
    return make_plan(load_recipe(path, settings), lambda source: source.name)


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> set[str]:
    return {stage for stage in now if now[stage] != before.get(stage)}


@pytest.mark.parametrize("key", RESULTS)
def test_a_changed_result_field_runs_exactly_what_depends_on_it(tiny_recipe_file, settings, key) -> None:
    value, expected = RESULTS[key]
    before = _plan(tiny_recipe_file, settings).input_hashes()
    now = _plan(tiny_recipe_file, (*settings, f"{key}={json.dumps(value)}")).input_hashes()
    assert _changed(before, now) == expected


@pytest.mark.parametrize("key", OPERATIONS)
def test_a_changed_operational_field_runs_nothing(tiny_recipe_file, settings, key) -> None:
    before = _plan(tiny_recipe_file, settings)
    now = _plan(tiny_recipe_file, (*settings, f"{key}={json.dumps(OPERATIONS[key])}"))
    assert now.recipe != before.recipe
    assert now.input_hashes() == before.input_hashes()


def test_another_baseline_runs_its_own_stages(tiny_recipe_file, settings) -> None:
    before = _plan(tiny_recipe_file, settings).input_hashes()
    now = _plan(tiny_recipe_file, (*settings, "select.baselines=[all_rnn, uniform]")).input_hashes()
    assert _changed(before, now) == {f"{kind}.all_rnn" for kind in KINDS}


def _leaves(model: type[BaseModel], marked: bool = False, key: str = "") -> dict[str, bool]:
    """Whether each field of a recipe, sections opened up, is marked; sections that are marked as a whole stay whole."""
    found: dict[str, bool] = {}
    for name, field in model.model_fields.items():
        inner, annotation = f"{key}{name}", field.annotation
        is_marked = marked or any(isinstance(mark, Mark) for mark in field.metadata)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and not is_marked:
            found |= _leaves(annotation, is_marked, f"{inner}.")
        else:
            found[inner] = is_marked
    return found


def test_every_field_is_classified() -> None:
    """A new field fails here until it is in one of the tables above."""
    wholes = {key.partition(".")[0] for key in OPERATIONS if key.startswith(("layout", "cluster", "fan_out"))}
    marked = {key for key in OPERATIONS if key.partition(".")[0] not in wholes} | wholes | STRUCTURE | SOURCES
    expected = dict.fromkeys(marked, True) | dict.fromkeys(RESULTS, False)
    assert _leaves(ConversionRecipe) == expected
    pretraining = _leaves(PretrainRecipe)
    trained = {f"pretrain.{key}": marked for key, marked in _leaves(TrainingSection).items()}
    own = {key: marked for key, marked in pretraining.items() if key not in expected}
    shape = {key: False for key in own if key.startswith("shape.")}
    assert own == {"tokenizer": True, **trained, **shape}


@pytest.mark.parametrize("contents", ["weights", "tokenizer", "text", "export files"])
def test_changed_files_run_what_reads_them(tiny_recipe_file, settings, contents) -> None:
    recipe = load_recipe(tiny_recipe_file, settings)
    before = make_plan(recipe, lambda source: source.name).input_hashes()

    def identify(source: Source) -> str:
        return source.name + ("!" if source.contents == contents else "")

    recalls = {"recall.96", "recall.128", "recall.192"}
    expected = {
        "weights": ALL_MODELS,
        "tokenizer": {"tokenize"} | recalls | ALL_MODELS - {"init"},
        "text": {"tokenize"} | recalls | ALL_MODELS - {"init"},
        "export files": {"export"},
    }
    assert _changed(before, make_plan(recipe, identify).input_hashes()) == expected[contents]


def test_more_episodes_of_a_length_leave_other_stages_of_that_length_alone(tiny_recipe_file) -> None:
    """A stage depends on the episodes that it reads, not on how many the store has."""
    before = _plan(tiny_recipe_file, ()).input_hashes()
    now = _plan(tiny_recipe_file, ("finetune.steps=50",)).input_hashes()
    assert _changed(before, now) == {"recall.128"} | FINETUNE_ON


def test_demo_with_other_finetune_steps_keeps_tokenize_init_and_align() -> None:
    before, now = (_plan(Path("demo"), settings).input_hashes() for settings in ((), ("finetune.steps=13",)))
    assert not {"tokenize", "recall.256", "init", "align", "select", "distill.hybrid"} & _changed(before, now)


def test_work_survives_json(tiny_recipe_file, tmp_path, monkeypatch) -> None:
    plan = _plan(tiny_recipe_file, ())
    stage = plan.stages[StageId("finetune", "uniform")]
    work = plan.work(stage, RunFolder(tmp_path / "run"))
    assert StageWork.from_json(json.loads(json.dumps(work.to_json()))) == work


def test_work_names_its_sources_whatever_the_working_folder(tiny_recipe_file, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("teacher-of-today")
    settings = ("teacher=link", "corpus.train=[text.jsonl, 'embedded:sotu']", "corpus.held_out=[held]")
    recipe = load_recipe(tiny_recipe_file, settings)
    inputs = StageInputs("init", {}, {}, {})
    work = StageWork(recipe, tmp_path, {}, inputs).to_json()["recipe"]
    assert work["corpus"]["train"] == [str(tmp_path / "text.jsonl"), "embedded:sotu"]
    assert work["corpus"]["held_out"] == [str(tmp_path / "held")]
    assert work["teacher"] == str(tmp_path / "link")


def _finish(plan: Plan, run: RunFolder, stages: list[str]) -> None:
    """Make `stages` done, as the pipeline does."""
    for name in stages:
        stage = plan.stages[StageId.parse(name)]
        attempt = stage.record(run).begin_attempt()
        plan.work(stage, run).record_in(attempt.folder)
        output = stage.record(run).folder / "out"
        output.write_text("")
        attempt.publish([output], {})


def _states(plan: Plan, run: RunFolder) -> dict[str, str]:
    return {str(stage): state for stage, state in stage_states(plan, run).items()}


def test_dry_run_says_what_is_kept_what_resumes_and_why_the_rest_is_new(tiny_recipe_file, tmp_path) -> None:
    run = RunFolder(tmp_path / "run")
    before = _plan(tiny_recipe_file, ())
    assert set(_states(before, run).values()) == {"new"}
    _finish(before, run, list(before.input_hashes()))
    assert set(_states(before, run).values()) == {"kept"}
    now = _plan(tiny_recipe_file, ("finetune.learning_rate=2e-5", "align.checkpoint_every=2"))
    states = _states(now, run)
    assert states["align"] == states["distill.uniform"] == "kept"
    assert states["finetune.hybrid"] == "new, because finetune.learning_rate changed from 0.001 to 2e-5"
    assert states["calibrate.hybrid"] == "new, because finetune.hybrid is new"
    assert states["export"] == "new, because finetune.hybrid is new"
    begun = now.stages[StageId("finetune", "hybrid")].record(run)
    begun.begin_attempt()
    (begun.folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert _states(now, run)["finetune.hybrid"] == "resumes at step 2"


def test_dry_run_names_changed_files(tiny_recipe_file, tmp_path) -> None:
    run, recipe = RunFolder(tmp_path / "run"), load_recipe(tiny_recipe_file)
    plan = make_plan(recipe, lambda source: source.name)
    _finish(plan, run, list(plan.input_hashes()))
    other = make_plan(recipe, lambda source: source.name + source.contents)
    assert _states(other, run)["init"] == "new, because the files of teacher changed"
    unread = make_plan(recipe, lambda source: None if source.contents == "text" else source.name)
    assert _states(unread, run)["tokenize"] == "new, because the files of corpus.train have to be read first"
    assert _states(unread, run)["init"] == "kept"


def test_attempts_keep_their_own_recipes(tiny_recipe_file, tmp_path) -> None:
    run = RunFolder(tmp_path / "run")
    recipes: list[Recipe] = []
    for settings in ((), ("align.checkpoint_every=2",)):
        plan = _plan(tiny_recipe_file, settings)
        stage = plan.stages[StageId("align")]
        attempt = stage.record(run).begin_attempt()
        plan.work(stage, run).record_in(attempt.folder)
        recipes.append(load_recipe(attempt.folder / "recipe.yaml"))
    assert [recipe.align.checkpoint_every for recipe in recipes if isinstance(recipe, ConversionRecipe)] == [4, 2]
    assert len(list((run.folder / "align").iterdir())) == 1


