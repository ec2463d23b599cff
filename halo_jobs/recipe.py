"""Recipes: YAML files that say what to convert, how, and with what data. They are checked key by key when loaded.

Fields affect the results of stages unless they are marked OPERATION or SOURCE (`halo_training.settings`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from halo_cluster.slurm.settings import SlurmSettings
from halo_evaluation.selection.scores import Method
from halo_training.settings import OPERATION, SOURCE, PositiveInt, Section, TrainingSection

ASSETS = Path(__file__).parent / "assets"
SHIPPED_RECIPES = Path(__file__).parent / "recipes"
EMBEDDED = "embedded:"

BaselineName = Literal["uniform", "last_half", "all_rnn"]


class CorpusSection(Section):
    """Text to train on: files or folders of .txt, .jsonl or .parquet. Whole documents are held out for evaluation."""

    train: Annotated[list[str], Field(min_length=1), SOURCE]
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    held_out: Annotated[list[str], SOURCE] = []
    recall_episodes: Annotated[int, Field(ge=0)] = 200_000
    """The most episodes that are generated for a context length."""
    answer_weight: PositiveInt = 4


class SelectSection(Section):
    """Which layers stay softmax attention."""

    method: Method = "halo"
    attention_layers: list[int] | None = None
    context_length: PositiveInt = 512
    items: PositiveInt = 64
    baselines: Annotated[list[BaselineName], OPERATION] = []


class CalibrateSection(Section):
    """How `a` of s_t = log(t + a) / log(a) is chosen: by the loss on long windows of held-out text."""

    candidates: Annotated[list[float], Field(min_length=1)] = [50.0, 100.0, 200.0, 500.0, 900.0]
    context_length: PositiveInt = 2048
    windows: PositiveInt = 8


class EvaluateSection(Section):
    """Local proxy tasks: needle grid and small suites."""

    contexts: Annotated[list[int], Field(min_length=1)] = [256, 512, 1024]
    depths: list[float] = [0.1, 0.3, 0.5, 0.7, 0.9]
    needle_items: PositiveInt = 4
    suite_items: PositiveInt = 64


class ExportSection(Section):
    """The exported Hugging Face folder."""

    max_shard_megabytes: PositiveInt = 4096


class ShapeSection(Section):
    """Shape of a model that is trained from scratch (Qwen3 architecture)."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    query_heads: PositiveInt
    kv_groups: PositiveInt
    head_dim: PositiveInt
    tied_embeddings: bool = True
    max_positions: PositiveInt = 4096


class LayoutSection(Section):
    """How the processes of a training stage share the model and the batch. Results depend on it by rounding only.

    The fields except `processes` are those of hypenet_megatron's ParallelLayout, which cannot be imported here: its
    package loads torch, and a recipe is checked before that.
    """

    processes: PositiveInt = 1
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    context: PositiveInt = 1
    sequence_parallel: bool = False
    virtual_pipeline: PositiveInt = 1
    first_stage_layers: PositiveInt | None = None
    last_stage_layers: PositiveInt | None = None
    pipeline_layout: str | None = None
    distributed_optimizer: bool = False
    overlap: bool = False
    recompute: Literal["attention", "layers"] | None = None


class ClusterSection(Section, SlurmSettings):  # type: ignore[misc]  # frozen by its configuration, not as a dataclass
    """What jobs request from Slurm (`--executor slurm`), and how failed jobs are retried."""

    sbatch: dict[str, str | int | bool] = {}
    retries: Annotated[int, Field(ge=0)] = 3
    backoff_seconds: Annotated[float, Field(ge=0)] = 15.0


class FanOutSection(Section):
    """Workers for the tasks of tokenisation, the layer sweep and the evaluations.

    Results depend on it by rounding only, through the number of threads of a CPU worker.

    One local worker is the stage's own process. Workers of a Slurm array are jobs with the time, partition, account and
    so on of the `cluster` section. `ray_address` is a Ray cluster to join; without it the stage starts one on the nodes
    of its Slurm allocation, or on this machine.
    """

    backend: Literal["local", "slurm-array", "ray"] = "local"
    workers: PositiveInt = 1
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    memory_gb_per_worker: Annotated[float, Field(gt=0)] | None = None
    ray_address: str | None = None


class _Common(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), OPERATION]
    seed: int = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    transformer_impl: Annotated[Literal["local", "transformer_engine"], OPERATION] = "local"
    """Implementation of linear layers, norms and softmax attention. Results are the same up to rounding."""
    corpus: CorpusSection
    layout: Annotated[LayoutSection, OPERATION] = LayoutSection()
    cluster: Annotated[ClusterSection, OPERATION] = ClusterSection()
    fan_out: Annotated[FanOutSection, OPERATION] = FanOutSection()

    def recall_episodes_of(self, section: TrainingSection) -> int:
        """Recall episodes that a training mixes in: enough for all of its steps, at most `corpus.recall_episodes`."""
        wanted = math.ceil(section.steps * section.global_batch * section.recall_share)
        return min(wanted, self.corpus.recall_episodes)


class ConversionRecipe(_Common):
    """Converts a teacher into a HypeNet hybrid by the stages of HALO."""

    kind: Annotated[Literal["conversion"], OPERATION] = "conversion"
    teacher: Annotated[str, SOURCE]
    student: str = "lightning"
    """The mixer that replaces attention: a name of `hypenet_megatron.mixers`, or `module:VARIABLE` of your own."""
    align: TrainingSection
    select: SelectSection = SelectSection()
    distill: TrainingSection
    finetune: TrainingSection
    calibrate: CalibrateSection = CalibrateSection()
    evaluate: EvaluateSection = EvaluateSection()
    export: ExportSection = ExportSection()

    @property
    def training_sections(self) -> dict[str, TrainingSection]:
        """Sections of the training stages by kind of stage."""
        return {"align": self.align, "distill": self.distill, "finetune": self.finetune}

    @property
    def tokenizer_folder(self) -> Path:
        return resolve_path(self.teacher)

    @property
    def evaluated_at(self) -> str:
        """The training stage whose context length models are evaluated at."""
        return "distill"


class PretrainRecipe(_Common):
    """Trains a small teacher of the Qwen3 architecture from scratch."""

    kind: Annotated[Literal["pretrain"], OPERATION]
    tokenizer: Annotated[str, SOURCE]
    shape: ShapeSection
    pretrain: TrainingSection
    evaluate: EvaluateSection = EvaluateSection()

    @property
    def training_sections(self) -> dict[str, TrainingSection]:
        return {"pretrain": self.pretrain}

    @property
    def tokenizer_folder(self) -> Path:
        return resolve_path(self.tokenizer)

    @property
    def evaluated_at(self) -> str:
        return "pretrain"


Recipe = ConversionRecipe | PretrainRecipe


def resolve_path(value: str) -> Path:
    """`embedded:NAME` is an asset of the package, anything else a path in which ~ is expanded."""
    if value.startswith(EMBEDDED):
        path = ASSETS / value.removeprefix(EMBEDDED)
        if not path.exists():
            raise ValueError(
                f"{value} is not an embedded asset; there are {sorted(p.name for p in ASSETS.iterdir())}"
            )
        return path
    return Path(value).expanduser()


def _known_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Keys that the section at `location` accepts."""
    for key in location:
        annotation = model.model_fields[str(key)].annotation if str(key) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return list(model.model_fields)


def _sentence(path: Path, model: type[BaseModel], error: ValidationError) -> str:
    """The first problem of a recipe in one sentence, with the nearest valid key when one is misspelt."""
    problem = error.errors()[0]
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        known = _known_keys(model, problem["loc"][:-1])
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        fix = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(known)}"
        return f"{path}: unknown key '{location}'; {fix}"
    if problem["type"] == "missing":
        return f"{path}: key '{location}' is missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: '{location or 'recipe'}' is not valid: {message}" + (
        f" (it is {problem['input']!r})" if problem["type"] != "value_error" else ""
    )


def _set_override(content: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value`. The value is read as YAML."""
    key, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override}: write it as section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        inner = content.get(section, {})
        if not isinstance(inner, dict):
            raise ValueError(f"--set {override}: '{section}' is not a section")
        content[section] = dict(inner)  # a YAML anchor may make other sections the same object
        content = content[section]
    content[last] = yaml.safe_load(value)


def recipe_class(content: dict[str, Any]) -> type[ConversionRecipe] | type[PretrainRecipe]:
    """The kind of recipe that parsed YAML or JSON holds."""
    return PretrainRecipe if content.get("kind") == "pretrain" else ConversionRecipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. ValueError names the file, the key and the fix."""
    if not path.is_file():
        shipped = SHIPPED_RECIPES / f"{path}.yaml"
        if not shipped.is_file():
            names = ", ".join(sorted(p.stem for p in SHIPPED_RECIPES.glob("*.yaml")))
            raise ValueError(f"{path} is neither a recipe file nor a shipped recipe ({names})")
        path = shipped
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no recipe; it should be a mapping of sections")
    for override in overrides:
        _set_override(content, override)
    model = recipe_class(content)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ValueError(_sentence(path, model, error)) from None


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe with every default spelt out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


ABSENT = "absent"


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value now) of every leaf of two recipes, or parts of them, that is not the same in both."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in [*before, *(name for name in now if name not in before)]:
            inner = f"{key}.{name}" if key else str(name)
            yield from differences(before.get(name, ABSENT), now.get(name, ABSENT), inner)
    elif before != now:
        yield key, before, now
