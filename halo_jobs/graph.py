"""The stages of a recipe and what each depends on. Pure data: nothing here runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable_files import sha256_file
from halo_cluster import input_hash
from halo_jobs.recipe import ConversionRecipe, PretrainRecipe, Recipe, TrainingSection, resolve_path
from halo_jobs.stages.context import StageContext, StageResult
from halo_jobs.stages.data import recall_episodes_needed, run_tokenize, tokenizer_folder
from halo_jobs.stages.export import run_export, run_export_teacher
from halo_jobs.stages.init import run_init
from halo_jobs.stages.measure import TEACHER, run_calibrate, run_evaluate
from halo_jobs.stages.select import run_select
from halo_jobs.stages.selected import MAIN_VARIANT
from halo_jobs.stages.training import run_align, run_distill, run_finetune, run_pretrain

HASH_WHOLE_FILE_BYTES = 64 * 10**6
# They say how a run is looked after, not what comes out.
_WITHOUT_EFFECT = {"keep_checkpoints", "keep_checkpoint_every", "watchdog_seconds"}


@dataclass(frozen=True)
class StageNode:
    """A stage: its function, the stages it reads, everything of the recipe that its result depends on, and whether it
    trains, in the recipe's layout."""

    name: str
    run: Callable[[StageContext], StageResult]
    depends_on: tuple[str, ...]
    settings: Mapping[str, Any]
    trains: bool = False


def fingerprint(path: Path) -> list[Any]:
    """What identifies source files: relative name, size and, for files up to 64 MB, SHA-256."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; correct the path in the recipe")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    entries = []
    for file in files:
        size = file.stat().st_size
        digest = sha256_file(file) if size <= HASH_WHOLE_FILE_BYTES else None
        entries.append([file.relative_to(path).as_posix(), size, digest])
    return entries


def _settings(section: TrainingSection) -> dict[str, Any]:
    return section.model_dump(exclude=_WITHOUT_EFFECT)


def _data_node(recipe: Recipe) -> StageNode:
    settings = {
        "corpus": recipe.corpus.model_dump(),
        "sources": [
            fingerprint(resolve_path(source)) for source in recipe.corpus.train + recipe.corpus.held_out
        ],
        "tokenizer": fingerprint(tokenizer_folder(recipe) / "tokenizer.json"),
        "recall": sorted(recall_episodes_needed(recipe).items()),
    }
    return StageNode("tokenize", run_tokenize, (), settings)


def _variant_nodes(recipe: ConversionRecipe, variant: str) -> list[StageNode]:
    distill, finetune, calibrate = (f"{stage}.{variant}" for stage in ("distill", "finetune", "calibrate"))
    data = ("tokenize", "init", "select")
    return [
        StageNode(distill, run_distill, (*data, "align"), _settings(recipe.distill), trains=True),
        StageNode(finetune, run_finetune, (*data, distill), _settings(recipe.finetune), trains=True),
        StageNode(calibrate, run_calibrate, (*data, finetune), recipe.calibrate.model_dump()),
        StageNode(
            f"evaluate.{variant}", run_evaluate, (*data, finetune, calibrate), recipe.evaluate.model_dump()
        ),
    ]


def _conversion_nodes(recipe: ConversionRecipe) -> list[StageNode]:
    teacher = {"teacher": fingerprint(resolve_path(recipe.teacher))}
    select = recipe.select.model_dump(exclude={"baselines"})
    main = _variant_nodes(recipe, MAIN_VARIANT)
    main_names = tuple(node.name for node in main)
    return [
        _data_node(recipe),
        StageNode("init", run_init, (), teacher),
        StageNode("align", run_align, ("tokenize", "init"), _settings(recipe.align), trains=True),
        StageNode("select", run_select, ("tokenize", "init", "align"), select),
        *main,
        StageNode(f"evaluate.{TEACHER}", run_evaluate, ("tokenize", "init"), recipe.evaluate.model_dump()),
        StageNode(
            "export",
            run_export,
            ("tokenize", "init", "align", "select", *main_names, f"evaluate.{TEACHER}"),
            recipe.export.model_dump(),
        ),
        *(node for baseline in recipe.select.baselines for node in _variant_nodes(recipe, baseline)),
    ]


def _pretrain_nodes(recipe: PretrainRecipe) -> list[StageNode]:
    training = {"pretrain": _settings(recipe.pretrain), "shape": recipe.shape.model_dump()}
    evaluate = f"evaluate.{TEACHER}"
    return [
        _data_node(recipe),
        StageNode("pretrain", run_pretrain, ("tokenize",), training, trains=True),
        StageNode(evaluate, run_evaluate, ("tokenize", "pretrain"), recipe.evaluate.model_dump()),
        StageNode("export", run_export_teacher, ("tokenize", "pretrain", evaluate), {}),
    ]


def stage_nodes(recipe: Recipe) -> list[StageNode]:
    """Stages in running order: the main hybrid and its export come before the baselines."""
    if isinstance(recipe, ConversionRecipe):
        return _conversion_nodes(recipe)
    return _pretrain_nodes(recipe)


def input_hashes(recipe: Recipe, nodes: list[StageNode]) -> dict[str, str]:
    """Per stage, a hash of all that its result depends on: settings, seed, precision, and the stages before it."""
    hashes: dict[str, str] = {}
    for node in nodes:
        hashes[node.name] = input_hash(
            {
                "stage": node.name,
                "settings": node.settings,
                "seed": recipe.seed,
                "precision": recipe.precision,
                "inputs": {name: hashes[name] for name in node.depends_on},
            }
        )
    return hashes
