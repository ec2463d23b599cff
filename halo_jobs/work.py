"""What a process is told to do: one stage of a plan, with everything that it needs to know, as a JSON file.

Imported by processes that only start others, so it loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable_files import write_json, write_text
from halo_cluster import RunFolder, StageRecord, input_hash
from halo_cluster.run_folder import INPUTS_FILE, RECIPE_FILE
from halo_cluster.stage_id import StageId
from halo_jobs.recipe import ConversionRecipe, Recipe, recipe_class, recipe_yaml


@dataclass(frozen=True)
class StageInputs:
    """Everything that the result of a stage depends on, as recorded in INPUTS.json beside its DONE.json.

    `settings` are keyed as in the recipe. `sources` has identities of files by recipe key, `stages` hashes of the
    stages that this one reads, by name.
    """

    stage: str
    settings: Mapping[str, Any]
    sources: Mapping[str, Any]
    stages: Mapping[str, str]

    @property
    def id(self) -> StageId:
        return StageId.parse(self.stage)

    @property
    def depends_on(self) -> tuple[StageId, ...]:
        return tuple(map(StageId.parse, self.stages))

    @property
    def hash(self) -> str:
        return input_hash(vars(self))

    def record(self, run: RunFolder) -> StageRecord:
        return run.stage(self.stage, self.hash)


@dataclass(frozen=True)
class StageWork:
    """All that a process needs to know to run a stage: `folder` is the stage's own, `folders` those that it reads."""

    recipe: Recipe
    folder: Path
    folders: Mapping[StageId, Path]
    inputs: StageInputs

    @property
    def id(self) -> StageId:
        return self.inputs.id

    @property
    def processes(self) -> int:
        return self.recipe.layout.processes if self.id.kind in self.recipe.training_sections else 1

    def record_in(self, attempt: Path) -> None:
        """Keep the recipe of an attempt in its folder, and what the stage depends on in the stage's."""
        write_text(attempt / RECIPE_FILE, recipe_yaml(self.recipe))
        if not (self.folder / INPUTS_FILE).exists():
            write_json(self.folder / INPUTS_FILE, vars(self.inputs))

    def to_json(self) -> dict[str, Any]:
        """As read by `from_json` in any working folder."""
        recipe = self.recipe.model_dump(mode="json")
        key = "teacher" if isinstance(self.recipe, ConversionRecipe) else "tokenizer"
        recipe[key] = str(self.recipe.tokenizer_folder.resolve())
        return {
            "stage": self.inputs.stage,
            "recipe": recipe,
            "folder": str(self.folder.resolve()),
            "folders": {str(stage): str(folder.resolve()) for stage, folder in self.folders.items()},
            "inputs": vars(self.inputs),
            "processes": self.processes,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> StageWork:
        return StageWork(
            recipe_class(content["recipe"]).model_validate(content["recipe"]),
            Path(content["folder"]),
            {StageId.parse(stage): Path(folder) for stage, folder in content["folders"].items()},
            StageInputs(**content["inputs"]),
        )
