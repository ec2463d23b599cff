"""Recipes: the YAML files that say what to convert, how, and with what data; checked key by key when loaded."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from halo_training.settings import PositiveInt, Section, TrainingSection

ASSETS = Path(__file__).parent / "assets"
SHIPPED_RECIPES = Path(__file__).parent / "recipes"
EMBEDDED = "embedded:"

# What says where and on what a recipe runs, not what comes out.
WHERE = {"layout", "cluster", "fan_out", "transformer_impl"}

SelectionMethod = Literal["halo", "jet_nemotron", "kl", "uniform", "last_half", "all_rnn"]
BaselineName = Literal["uniform", "last_half", "all_rnn"]


class CorpusSection(Section):
    """Text to train on: files or folders of .txt, .jsonl or .parquet; whole documents are held out for evaluation."""

    train: Annotated[list[str], Field(min_length=1)]
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    held_out: list[str] = []
    recall_episodes: Annotated[int, Field(ge=0)] = 200_000
    answer_weight: PositiveInt = 4


class SelectSection(Section):
    """Which layers stay softmax attention."""

    method: SelectionMethod = "halo"
    attention_layers: list[int] | None = None
    context_length: PositiveInt = 512
    items: PositiveInt = 64
    baselines: list[BaselineName] = []


class CalibrateSection(Section):
    """Choice of `a` in s_t = log(t + a) / log(a) by the loss on long windows of held-out text."""

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
    """The Hugging Face folder that the conversion ends in."""

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
    """How the processes of a training stage share the model and the batch; results depend on it by rounding alone.

    Fields but `processes` are those of hypenet_megatron's ParallelLayout.
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


class ClusterSection(Section):
    """What jobs ask of Slurm (`--executor slurm`), and how failures are met. No result depends on it.

    Fields but `retries` and `backoff_seconds` are those of halo_cluster's SlurmSettings.
    """

    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt | None = None
    cpus_per_node: PositiveInt | None = None
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    time_minutes: PositiveInt = 240
    grace_seconds: PositiveInt = 120
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    container: str | None = None
    sbatch: dict[str, str | int | bool] = {}
    retries: Annotated[int, Field(ge=0)] = 3
    backoff_seconds: Annotated[float, Field(ge=0)] = 15.0


class FanOutSection(Section):
    """Who computes the tasks of tokenisation, of the layer sweep and of evaluations. No result depends on it but by the
    threads of a CPU worker.

    One local worker is the stage's own process. Workers of a Slurm array are jobs of their own, asked for with the
    `cluster` section's time, partition, account and so on. `ray_address` is a cluster to join; without it one is
    started, on the nodes of the Slurm allocation that the stage runs in, or on this machine.
    """

    backend: Literal["local", "slurm-array", "ray"] = "local"
    workers: PositiveInt = 1
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    memory_gb_per_worker: Annotated[float, Field(gt=0)] | None = None
    ray_address: str | None = None


class _Common(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: int = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Who makes linear layers, norms and softmax attention; results and files are the same up to rounding."""
    corpus: CorpusSection
    layout: LayoutSection = LayoutSection()
    cluster: ClusterSection = ClusterSection()
    fan_out: FanOutSection = FanOutSection()


class ConversionRecipe(_Common):
    """Teacher in, HypeNet hybrid out: the stages of HALO."""

    kind: Literal["conversion"] = "conversion"
    teacher: str
    align: TrainingSection
    select: SelectSection = SelectSection()
    distill: TrainingSection
    finetune: TrainingSection
    calibrate: CalibrateSection = CalibrateSection()
    evaluate: EvaluateSection = EvaluateSection()
    export: ExportSection = ExportSection()


class PretrainRecipe(_Common):
    """A small Qwen3-architecture teacher from scratch."""

    kind: Literal["pretrain"]
    tokenizer: str
    shape: ShapeSection
    pretrain: TrainingSection
    evaluate: EvaluateSection = EvaluateSection()


Recipe = ConversionRecipe | PretrainRecipe


def resolve_path(value: str) -> Path:
    """`embedded:NAME` is an asset of the package; anything else is a path as the shell would read it."""
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
        mend = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(known)}"
        return f"{path}: unknown key '{location}'; {mend}"
    if problem["type"] == "missing":
        return f"{path}: key '{location}' is missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: '{location or 'recipe'}' is not valid: {message}" + (
        f" (it is {problem['input']!r})" if problem["type"] != "value_error" else ""
    )


def _set_override(content: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value`; the value is read as YAML."""
    key, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override}: write it as section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        inner = content.get(section, {})
        if not isinstance(inner, dict):
            raise ValueError(f"--set {override}: '{section}' is not a section")
        content[section] = dict(inner)  # by a YAML anchor other sections may be the same object
        content = content[section]
    content[last] = yaml.safe_load(value)


def recipe_class(content: dict[str, Any]) -> type[ConversionRecipe] | type[PretrainRecipe]:
    """What kind of recipe `content`, as YAML or JSON had it, is to be read as."""
    return PretrainRecipe if content.get("kind") == "pretrain" else ConversionRecipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; ValueError names the file, the key and the mend."""
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
    """The recipe with every default spelt out, as frozen in a run folder; without where it runs, which may change."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude=WHERE), sort_keys=False)
