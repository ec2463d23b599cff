"""The published results of the select and evaluate stages. Stages write them; reports and later stages read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from durable_files import read_json, write_json
from halo_evaluation.selection.scores import LayerSweep


class _Published:
    """A record that is kept as one JSON file of a stage folder."""

    FILE: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        return TypeAdapter(cls).validate_python(read_json(folder / cls.FILE))

    def write(self, folder: Path) -> Path:
        """Write the record into `folder`; returns the path of the file."""
        path = folder / self.FILE
        write_json(path, asdict(self))  # type: ignore[call-overload]
        return path


@dataclass(frozen=True)
class Selection(_Published):
    """Which layers stay attention. Layers are counted from 0.

    `importance` has one entry per layer, None where the method does not rank layers. `choices` has the layers that
    every method would keep. `tasks` has the metrics behind the sweep: those of the teacher, then those of every M(i).
    """

    FILE = "selection.json"

    method: str
    attention_layers: tuple[int, ...]
    sweep: LayerSweep
    importance: tuple[float | None, ...]
    choices: Mapping[str, tuple[int, ...]]
    tasks: tuple[Mapping[str, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True)
class NeedleCell:
    """Score in [0, 1] of `items` needle-in-a-haystack items; depth 0 is the start of the context."""

    task: str
    context_length: int
    depth: float
    score: float
    items: int


@dataclass(frozen=True)
class Evaluation(_Published):
    """Results of one model. `training_context` is in tokens, perplexities are per token of held-out text.

    `model` is "teacher", "hybrid", or the name of a baseline.
    """

    FILE = "evaluation.json"

    model: str
    training_context: int
    tasks: Mapping[str, Mapping[str, Any]]
    niah: tuple[NeedleCell, ...]
    perplexity: float | None
    ngram_perplexity: float | None = None
    """Of a trigram model of the same training text; measured for a model trained from scratch."""

    def needle_recall(self, shortest: int, longest: int) -> float | None:
        """Share of needle items answered, over contexts in [shortest, longest] tokens; None without any."""
        cells = [cell for cell in self.niah if shortest <= cell.context_length <= longest]
        items = sum(cell.items for cell in cells)
        return sum(cell.score * cell.items for cell in cells) / items if items else None

    @property
    def niah_contexts(self) -> tuple[int, ...]:
        return tuple(sorted({cell.context_length for cell in self.niah}))
