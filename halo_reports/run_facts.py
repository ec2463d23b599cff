"""The facts that reports and model cards state about a run, read from the files that its stages published.

Reads metrics.jsonl, selection.json, evaluation.json, calibration.json and DONE.json of each stage folder, and the
recipe.yaml of the run. A missing file leaves its facts empty. A malformed file raises ValueError with its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from durable_files import read_json
from halo_cluster.stage_id import StageId
from halo_evaluation.results import Evaluation, Selection

STAGE_ORDER = (
    "tokenize",
    "recall",
    "pretrain",
    "init",
    "align",
    "select",
    "distill",
    "finetune",
    "calibrate",
    "evaluate",
    "export",
    "report",
)
MODEL_ORDER = ("teacher", "hybrid", "uniform", "last_half", "all_rnn")
BASELINES = MODEL_ORDER[2:]


def model_rank(model: str) -> int:
    """Sort key: teacher, hybrid, then the baselines in MODEL_ORDER."""
    return MODEL_ORDER.index(model) if model in MODEL_ORDER else len(MODEL_ORDER)


@dataclass(frozen=True)
class FinishedStage:
    """DONE.json of one stage. `seconds` is wall time over all attempts."""

    name: str
    folder: Path
    attempt: str
    seconds: float
    started: datetime
    finished: datetime
    input_hash: str
    outputs: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def family(self) -> str:
        return StageId.parse(self.name).kind

    @property
    def variant(self) -> str:
        return StageId.parse(self.name).variant

    @property
    def is_baseline(self) -> bool:
        return self.variant in BASELINES


@dataclass(frozen=True)
class TrainingCurve:
    """metrics.jsonl of one training stage, one entry per step, ascending."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    tokens_per_second: tuple[float, ...]
    consumed_tokens: int

    @property
    def final_loss(self) -> float:
        """Mean loss over the last twentieth of the steps, because the loss of a single batch is noisy."""
        tail = self.losses[-max(1, len(self.losses) // 20) :]
        return sum(tail) / len(tail)

    @property
    def median_tokens_per_second(self) -> float:
        return sorted(self.tokens_per_second)[len(self.tokens_per_second) // 2]


class Candidate(NamedTuple):
    base: float | None
    loss: float


@dataclass(frozen=True)
class Calibration:
    """calibration.json: loss in nats per token of each candidate base. Base None means no logits scaling."""

    base: float | None
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run so far. `curves` is keyed by stage name, `evaluations` and `calibrations` by model."""

    name: str
    recipe: str | None
    stages: tuple[FinishedStage, ...]
    curves: Mapping[str, TrainingCurve]
    selection: Selection | None
    evaluations: Mapping[str, Evaluation]
    calibrations: Mapping[str, Calibration]

    @property
    def seconds(self) -> float:
        return sum(record.seconds for record in self.stages)

    @property
    def fair_context(self) -> int | None:
        """The longest context that every evaluated model was trained on, in tokens."""
        return min((evaluation.training_context for evaluation in self.evaluations.values()), default=None)

    @property
    def export_folder(self) -> Path | None:
        """The folder of the exported model: the one with config.json among the outputs of the export stage."""
        record = next((record for record in self.stages if record.name == "export"), None)
        if record is None:
            return None
        configs = [record.folder / name for name in record.outputs if Path(name).name == "config.json"]
        return min(configs, key=lambda path: len(path.parts)).parent if configs else record.folder


def load_run(run_folder: Path, stage_folders: Mapping[str, Path]) -> RunFacts:
    """Read a run. `stage_folders` maps stage names such as "distill.hybrid" to their <input hash> folders.

    Raises ValueError with the name of a malformed file.
    """
    ordered = sorted(stage_folders.items(), key=lambda item: _stage_rank(item[0]))
    selections = _of_stages(Selection.FILE, ordered, Selection)
    evaluations = _of_stages(Evaluation.FILE, ordered, Evaluation)
    recipe = run_folder / "recipe.yaml"
    return RunFacts(
        name=run_folder.resolve().name,
        recipe=recipe.read_text() if recipe.is_file() else None,
        stages=tuple(
            _parse(folder / "DONE.json", FinishedStage, name=name, folder=folder)
            for name, folder in ordered
            if (folder / "DONE.json").is_file()
        ),
        curves={name: curve for name, folder in ordered if (curve := _curve(folder / "metrics.jsonl"))},
        selection=next(iter(selections.values()), None),
        evaluations=dict(
            sorted(
                ((evaluation.model, evaluation) for evaluation in evaluations.values()),
                key=lambda item: model_rank(item[0]),
            )
        ),
        calibrations={
            StageId.parse(name).variant or "hybrid": calibration
            for name, calibration in _of_stages("calibration.json", ordered, Calibration).items()
        },
    )


def _stage_rank(name: str) -> tuple[bool, int, int, str]:
    stage = StageId.parse(name)
    order = STAGE_ORDER.index(stage.kind) if stage.kind in STAGE_ORDER else len(STAGE_ORDER)
    return (stage.variant in BASELINES, order, model_rank(stage.variant), name)


def _parse[T](path: Path, record: type[T], **more: Any) -> T:
    content = read_json(path)
    try:
        return TypeAdapter(record).validate_python({**content, **more})
    except (TypeError, ValidationError) as error:
        problem = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ValueError(f"{path} is malformed ({problem}); rerun its stage") from None


def _of_stages[T](file: str, ordered: list[tuple[str, Path]], record: type[T]) -> dict[str, T]:
    return {name: _parse(folder / file, record) for name, folder in ordered if (folder / file).is_file()}


def _curve(path: Path) -> TrainingCurve | None:
    """The curve of a metrics.jsonl; None if it is missing or has no complete line.

    After a kill the file may have steps that the next attempt repeats, and an incomplete last line. Of a repeated step
    the later line counts, and an incomplete last line is ignored.
    """
    if not path.is_file():
        return None
    by_step: dict[int, Mapping[str, Any]] = {}
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            by_step[int(entry["step"])] = {key: float(entry[key]) for key in _CURVE_KEYS}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is not a metrics line ({error}); remove it") from None
    if not by_step:
        return None
    entries = sorted(by_step.items())
    return TrainingCurve(
        steps=tuple(step for step, _ in entries),
        losses=tuple(entry["loss"] for _, entry in entries),
        tokens_per_second=tuple(entry["tokens_per_second"] for _, entry in entries),
        consumed_tokens=int(entries[-1][1]["consumed_tokens"]),
    )


_CURVE_KEYS = ("loss", "tokens_per_second", "consumed_tokens")
