"""StageWork: one stage of a plan with all that a process needs to run it, as a JSON file.

Processes that only start other processes import this module, so it does not import torch.
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
from halo_jobs.recipe import EMBEDDED, ConversionRecipe, Recipe, recipe_class, recipe_yaml, resolve_path


def _absolute(source: str) -> str:
    """A source of the corpus, whatever the working folder; an embedded one keeps the name that model cards show."""
    return source if source.startswith(EMBEDDED) else str(resolve_path(source).absolute())


@dataclass(frozen=True)
class StageInputs:
    """Everything that the result of a stage depends on, recorded as INPUTS.json in the stage's folder.

    `settings` has the keys of the recipe. `sources` maps recipe keys to identities of files, `stages` maps names of the
    stages that this one reads to their input hashes.
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
    """A stage to run. `folder` is the stage's own folder; `folders` are those of the stages that it reads."""

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
        """Write the recipe to the folder of the attempt, and the inputs to the folder of the stage."""
        write_text(attempt / RECIPE_FILE, recipe_yaml(self.recipe))
        if not (self.folder / INPUTS_FILE).exists():
            write_json(self.folder / INPUTS_FILE, vars(self.inputs))

    def to_json(self) -> dict[str, Any]:
        """JSON for `from_json`, with absolute paths, so that the working folder does not matter."""
        recipe = self.recipe.model_dump(mode="json")
        key = "teacher" if isinstance(self.recipe, ConversionRecipe) else "tokenizer"
        recipe[key] = str(self.recipe.tokenizer_folder.absolute())
        for sources in (recipe["corpus"]["train"], recipe["corpus"]["held_out"]):
            sources[:] = [_absolute(source) for source in sources]
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
