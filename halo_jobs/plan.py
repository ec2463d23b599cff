"""The stages of a recipe, what each depends on, and the input hash that names its folder.

Pure data. The driver makes a plan once and gives every process its `StageWork`; no other process computes a hash or
looks at a source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from halo_cluster import RunFolder
from halo_cluster.stage_id import StageId
from halo_jobs.recipe import ConversionRecipe, PretrainRecipe, Recipe, resolve_path
from halo_jobs.sources import Source
from halo_jobs.work import StageInputs, StageWork

MAIN_VARIANT, TEACHER = "hybrid", "teacher"
TOKENIZE, INIT, ALIGN, SELECT, EXPORT, PRETRAIN = map(
    StageId, ("tokenize", "init", "align", "select", "export", "pretrain")
)
EVALUATE_TEACHER = StageId("evaluate", TEACHER)

Identify = Callable[[Source], str | None]
"""Identity of a source's files by their content; None if they were not read yet."""


@dataclass(frozen=True)
class Plan:
    """The stages of `recipe` in running order: the main hybrid and its export come before the baselines."""

    recipe: Recipe
    stages: Mapping[StageId, StageInputs]
    sources: tuple[Source, ...]

    def work(self, stage: StageInputs, run: RunFolder) -> StageWork:
        folders = {other: self.stages[other].record(run).folder for other in stage.depends_on}
        return StageWork(self.recipe, stage.record(run).folder, folders, stage)

    def input_hashes(self) -> dict[str, str]:
        return {stage.stage: stage.hash for stage in self.stages.values()}


def make_plan(recipe: Recipe, identify: Identify) -> Plan:
    return _Planner(recipe, identify).plan()


class _Planner:
    def __init__(self, recipe: Recipe, identify: Identify) -> None:
        self.recipe = recipe
        self.identify = identify
        self.stages: dict[StageId, StageInputs] = {}
        self.identities: dict[StageId, str] = {}
        self.sources: list[Source] = []
        self.numerics = {"seed": recipe.seed, "precision": recipe.precision}

    def plan(self) -> Plan:
        self._tokenize()
        self._recall()
        if isinstance(self.recipe, ConversionRecipe):
            self._conversion(self.recipe)
        else:
            self._pretraining(self.recipe)
        return Plan(self.recipe, self.stages, tuple(self.sources))

    def _add(
        self,
        stage: StageId,
        depends_on: tuple[StageId, ...],
        settings: Mapping[str, Any],
        sources: tuple[Source, ...] = (),
        *,
        extent: Mapping[str, Any] | None = None,
    ) -> None:
        """`extent` says how much the stage makes of the same thing: later stages depend on what they use of it."""
        stages = {str(other): self.identities[other] for other in depends_on}
        found: dict[str, list[str | None]] = {}
        for source in sources:
            found.setdefault(source.key, []).append(self.identify(source))
        self.stages[stage] = StageInputs(str(stage), {**settings, **(extent or {})}, found, stages)
        self.identities[stage] = StageInputs(str(stage), settings, found, stages).hash
        self.sources += sources

    def _tokenize(self) -> None:
        corpus = self.recipe.corpus
        tokenizer = Source("tokenizer", self.recipe.tokenizer_folder, "tokenizer")
        text = tuple(
            Source(f"corpus.{key}", resolve_path(path), "text")
            for key in ("train", "held_out")
            for path in getattr(corpus, key)
        )
        self._add(TOKENIZE, (), {"corpus": {"held_out_share": corpus.held_out_share}}, (tokenizer, *text))

    def _recall(self) -> None:
        """Episode n does not depend on how many there are, so a longer store changes only the stages that read more."""
        needed: dict[int, int] = {}
        for section in self.recipe.training_sections.values():
            if section.recall_share > 0.0:
                episodes = self.recipe.recall_episodes_of(section)
                needed[section.context_length] = max(needed.get(section.context_length, 0), episodes)
        for context_length, episodes in needed.items():
            settings = {"seed": self.recipe.seed, "corpus": {"answer_weight": self.recipe.corpus.answer_weight}}
            extent = {"episodes": episodes}
            self._add(StageId("recall", str(context_length)), (TOKENIZE,), settings, extent=extent)

    def _training(self, stage: StageId, depends_on: tuple[StageId, ...], **more: Any) -> None:
        section = self.recipe.training_sections[stage.kind]
        settings = {**self.numerics, stage.kind: section.result_settings(), **more}
        if section.recall_share > 0.0:
            depends_on += (StageId("recall", str(section.context_length)),)
            settings["recall_episodes"] = self.recipe.recall_episodes_of(section)
        self._add(stage, depends_on, settings)

    def _evaluate(self, variant: str, depends_on: tuple[StageId, ...]) -> None:
        trained = self.recipe.evaluated_at
        context_length = self.recipe.training_sections[trained].context_length
        settings = {
            **self.numerics,
            "evaluate": self.recipe.evaluate.result_settings(),
            trained: {"context_length": context_length},
        }
        self._add(StageId("evaluate", variant), depends_on, settings)

    def _conversion(self, recipe: ConversionRecipe) -> None:
        teacher = Source("teacher", resolve_path(recipe.teacher), "weights")
        self._add(INIT, (), {**self.numerics, "student": recipe.student}, (teacher,))
        self._training(ALIGN, (TOKENIZE, INIT))
        select = {**self.numerics, "select": recipe.select.result_settings()}
        self._add(SELECT, (TOKENIZE, INIT, ALIGN), select)
        main = self._variant(recipe, MAIN_VARIANT)
        self._evaluate(TEACHER, (TOKENIZE, INIT))
        exported = (TOKENIZE, INIT, ALIGN, SELECT, *main, EVALUATE_TEACHER)
        export = {"precision": recipe.precision, "export": recipe.export.result_settings()}
        self._add(EXPORT, exported, export, self._export_sources())
        for baseline in recipe.select.baselines:
            self._variant(recipe, baseline)

    def _variant(self, recipe: ConversionRecipe, variant: str) -> tuple[StageId, ...]:
        kinds = ("distill", "finetune", "calibrate", "evaluate")
        distill, finetune, calibrate, evaluate = (StageId(kind, variant) for kind in kinds)
        data = (TOKENIZE, INIT, SELECT)
        self._training(distill, (*data, ALIGN))
        self._training(finetune, (*data, distill))
        settings = {**self.numerics, "calibrate": recipe.calibrate.result_settings()}
        self._add(calibrate, (*data, finetune), settings)
        self._evaluate(variant, (*data, finetune, calibrate))
        return distill, finetune, calibrate, evaluate

    def _pretraining(self, recipe: PretrainRecipe) -> None:
        self._training(PRETRAIN, (TOKENIZE,), shape=recipe.shape.result_settings())
        self._evaluate(TEACHER, (TOKENIZE, PRETRAIN))
        export = {"precision": recipe.precision}
        self._add(EXPORT, (TOKENIZE, PRETRAIN, EVALUATE_TEACHER), export, self._export_sources())

    def _export_sources(self) -> tuple[Source, ...]:
        """What an export copies or cites beside the weights."""
        return (Source("tokenizer", self.recipe.tokenizer_folder, "export files"),)
