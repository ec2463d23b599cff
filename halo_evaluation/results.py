"""The published results of the select and evaluate stages, which reports and later stages read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from durable_files import read_json, write_json
from halo_evaluation.selection.scores import LayerSweep


class _Published:
    """A record that is stored as one JSON file in a stage folder."""

    FILE: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        return TypeAdapter(cls).validate_python(read_json(folder / cls.FILE))

    def write(self, folder: Path) -> Path:
        """Write the record to `folder` and return the path of the file."""
        path = folder / self.FILE
        write_json(path, asdict(self))  # type: ignore[call-overload]
        return path


@dataclass(frozen=True)
class Selection(_Published):
    """The layers that stay softmax attention, counted from 0.

    `importance` has one entry per layer; entries are None if the method does not rank layers. `choices` has the layers
    that each method would keep. `tasks` has the metrics behind the sweep: the teacher's, then those of each M(i).
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
    """Score in [0, 1] over `items` needle-in-a-haystack items. Depth 0 is the start of the context."""

    task: str
    context_length: int
    depth: float
    score: float
    items: int


@dataclass(frozen=True)
class Evaluation(_Published):
    """Results of one model: "teacher", "hybrid", or the name of a baseline.

    `training_context` is in tokens. Perplexities are per token of held-out text.
    """

    FILE = "evaluation.json"

    model: str
    training_context: int
    tasks: Mapping[str, Mapping[str, Any]]
    niah: tuple[NeedleCell, ...]
    perplexity: float | None
    ngram_perplexity: float | None = None
    """Perplexity of a trigram model of the same training text. Only for a model that is trained from scratch."""

    def needle_recall(self, shortest: int, longest: int) -> float | None:
        """Share of correct needle items over contexts in [shortest, longest] tokens; None if there are none."""
        cells = [cell for cell in self.niah if shortest <= cell.context_length <= longest]
        items = sum(cell.items for cell in cells)
        return sum(cell.score * cell.items for cell in cells) / items if items else None

    @property
    def niah_contexts(self) -> tuple[int, ...]:
        return tuple(sorted({cell.context_length for cell in self.niah}))
