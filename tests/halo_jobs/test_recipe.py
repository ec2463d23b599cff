"""Recipes are checked key by key; every shipped one loads."""

from pathlib import Path

import pytest
import yaml

from halo_jobs.recipe import SHIPPED_RECIPES, ConversionRecipe, PretrainRecipe, load_recipe, recipe_yaml
from halo_training.schedule import learning_rate
from hypenet_megatron.presets import HYPENET_PRESETS


@pytest.mark.parametrize("path", sorted(SHIPPED_RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load_by_name(path):
    recipe = load_recipe(path.with_suffix("").relative_to(SHIPPED_RECIPES))
    assert recipe.name == path.stem
    assert isinstance(recipe, PretrainRecipe if path.stem.startswith("teacher") else ConversionRecipe)


def test_kept_recipe_loads_to_the_same(tiny_recipe, tmp_path):
    path = tmp_path / "kept.yaml"
    path.write_text(recipe_yaml(tiny_recipe))
    assert load_recipe(path) == tiny_recipe


def _load(content: dict, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_recipe(path)


def test_misspelt_key_is_named_with_the_nearest(tiny_recipe_content, tmp_path):
    tiny_recipe_content["align"] = {**tiny_recipe_content["align"], "learning_rat": 1.0}
    with pytest.raises(
        ValueError, match=r"recipe.yaml: unknown key 'align.learning_rat'; did you mean 'learning_rate'"
    ):
        _load(tiny_recipe_content, tmp_path)


def test_misspelt_section_is_named_with_the_nearest(tiny_recipe_content, tmp_path):
    tiny_recipe_content["distil"] = tiny_recipe_content["distill"]
    with pytest.raises(ValueError, match="unknown key 'distil'; did you mean 'distill'"):
        _load(tiny_recipe_content, tmp_path)


def test_missing_key_is_named(tiny_recipe_content, tmp_path):
    del tiny_recipe_content["teacher"]
    with pytest.raises(ValueError, match="key 'teacher' is missing"):
        _load(tiny_recipe_content, tmp_path)


def test_wrong_value_is_shown(tiny_recipe_content, tmp_path):
    tiny_recipe_content["distill"] = {**tiny_recipe_content["distill"], "steps": "many"}
    with pytest.raises(ValueError, match=r"'distill.steps' is not valid.*'many'"):
        _load(tiny_recipe_content, tmp_path)


def test_batches_that_do_not_divide(tiny_recipe_content, tmp_path):
    tiny_recipe_content["align"] = {**tiny_recipe_content["align"], "micro_batch": 3}
    with pytest.raises(ValueError, match="global_batch 4 is not a multiple of micro_batch 3"):
        _load(tiny_recipe_content, tmp_path)


def test_unknown_recipe_lists_the_shipped_ones(tmp_path):
    with pytest.raises(ValueError, match=r"neither a recipe file nor a shipped recipe \(demo, "):
        load_recipe(tmp_path / "absent")


def test_broken_yaml_is_one_sentence(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("name: [unclosed")
    with pytest.raises(ValueError, match=r"broken.yaml is not valid YAML") as problem:
        load_recipe(path)
    assert "\n" not in str(problem.value)


def test_override_changes_one_key(tiny_recipe_file):
    assert "align: &" in tiny_recipe_file.read_text() and "distill: *" in tiny_recipe_file.read_text()
    before = load_recipe(tiny_recipe_file)
    recipe = load_recipe(tiny_recipe_file, ["distill.steps=77", "corpus.train=[a, b]"])
    assert recipe.distill.steps == 77 and recipe.align == before.align
    assert recipe.corpus.train == ["a", "b"]
    with pytest.raises(ValueError, match=r"section\.key=value"):
        load_recipe(tiny_recipe_file, ["distill.steps"])


def test_cosine_schedule_warms_up_and_ends_low(tiny_recipe):
    section = tiny_recipe.align.model_copy(update={"steps": 100, "warmup_steps": 10})
    rates = [learning_rate(section, step) for step in range(100)]
    assert rates[0] == pytest.approx(section.learning_rate / 10)
    assert max(rates) == pytest.approx(section.learning_rate)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(section.final_learning_rate, rel=0.5)


def test_constant_schedule_stays(tiny_recipe):
    section = tiny_recipe.finetune.model_copy(update={"schedule": "constant", "warmup_steps": 0})
    assert {learning_rate(section, step) for step in range(50)} == {section.learning_rate}


def test_published_recipe_has_the_published_layers():
    recipe = load_recipe(Path("hypenet-2b"))
    preset = HYPENET_PRESETS["hypenet-2b"]
    assert isinstance(recipe, ConversionRecipe)
    assert tuple(recipe.select.attention_layers or ()) == preset.attention_layers
    tokens = [
        section.steps * section.tokens_per_step for section in (recipe.align, recipe.distill, recipe.finetune)
    ]
    assert [round(count / 1e9, 2) for count in tokens] == [0.33, 0.98, 1.05]
