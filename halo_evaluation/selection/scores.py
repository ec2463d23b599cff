"""From the scores of a layer sweep to the layers that stay attention. Numbers in, layer indices out.

M(i) is the teacher with only layer i (counted from 0) replaced by its aligned RNN mixer. R_i and C_i in
[0, 1] are the recall and commonsense scores of M(i). A layer matters when M(i) recalls worse, and it matters
for recall when M(i) loses little else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from durable_files import read_json

Method = Literal["halo", "jet_nemotron", "kl", "uniform", "last_half", "all_rnn"]
METHODS: tuple[Method, ...] = get_args(Method)

HALO_EPSILON = 1e-6
HALO_CAP = 50.0


@dataclass(frozen=True)
class LayerScore:
    """Scores of M(layer): recall and commonsense in [0, 1], kl in nats per token (None if not measured)."""

    layer: int
    recall: float
    commonsense: float
    kl: float | None = None


@dataclass(frozen=True)
class LayerSweep:
    """One LayerScore per layer, ordered from layer 0, and the unchanged teacher's own scores.

    `commonsense_error` is the standard error of a commonsense score, 0 where suites are large enough to ignore it.
    Raises ValueError when a layer is missing, repeated or out of order, or when a score is not finite.
    """

    layers: tuple[LayerScore, ...]
    teacher_recall: float
    teacher_commonsense: float
    commonsense_error: float = 0.0

    def __post_init__(self) -> None:
        indices = [score.layer for score in self.layers]
        if not indices or indices != list(range(len(indices))):
            raise ValueError(
                f"the layer sweep must score layers 0, 1, 2, ... once each, but holds {indices}; sweep again"
            )
        for score in self.layers:
            measured = [score.recall, score.commonsense, 0.0 if score.kl is None else score.kl]
            if not all(math.isfinite(value) for value in measured):
                raise ValueError(
                    f"the layer sweep has a score of layer {score.layer} that is not finite: {score}"
                )

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def halo_importance(sweep: LayerSweep) -> tuple[float, ...]:
    """s_i = (max_j R_j - R_i) / (max_j C_j - C_i + epsilon), at most 50; the maxima run over the M(j) only.

    The published epsilon is 1e-6, over suites of ten thousand items. Over a few hundred, the layer with the largest
    C by chance has a denominator of 1e-6 and gets the cap for any recall loss at all, before a layer that costs all
    recall. Ours adds the standard error of C: no difference in C is taken for smaller than can be seen.
    """
    best_recall = max(score.recall for score in sweep.layers)
    best_commonsense = max(score.commonsense for score in sweep.layers)
    epsilon = HALO_EPSILON + sweep.commonsense_error
    return tuple(
        min(HALO_CAP, (best_recall - score.recall) / (best_commonsense - score.commonsense + epsilon))
        for score in sweep.layers
    )


def jet_nemotron_importance(sweep: LayerSweep) -> tuple[float, ...]:
    """max_j R_j - R_i: the recall that replacing layer i costs, whatever else it costs."""
    best_recall = max(score.recall for score in sweep.layers)
    return tuple(best_recall - score.recall for score in sweep.layers)


def kl_importance(sweep: LayerSweep) -> tuple[float, ...]:
    """KL(teacher || M(i)) in nats per token. Raises ValueError when the sweep did not measure it."""
    divergences = [score.kl for score in sweep.layers if score.kl is not None]
    if len(divergences) < sweep.num_layers:
        missing = next(score.layer for score in sweep.layers if score.kl is None)
        raise ValueError(
            f"the layer sweep has no KL for layer {missing}; choose another selection method or sweep again"
        )
    return tuple(divergences)


_IMPORTANCE: Mapping[Method, Callable[[LayerSweep], tuple[float, ...]]] = {
    "halo": halo_importance,
    "jet_nemotron": jet_nemotron_importance,
    "kl": kl_importance,
}


def layer_importance(method: Method, sweep: LayerSweep) -> tuple[float, ...] | None:
    """One importance per layer, higher stays attention; None for methods that do not look at scores."""
    return _IMPORTANCE[method](sweep) if method in _IMPORTANCE else None


def evenly_spaced_layers(first: int, end: int, count: int) -> tuple[int, ...]:
    """Cut layers [first, end) into `count` groups as equal as possible and take the last layer of each."""
    return tuple(first + (group + 1) * (end - first) // count - 1 for group in range(count))


def choose_attention_layers(
    method: Method, sweep: LayerSweep, num_attention_layers: int | None = None
) -> tuple[int, ...]:
    """The layers that stay attention, ascending. `num_attention_layers` defaults to floor(L / 4).

    halo, jet_nemotron, kl: the most important layers; of equally important ones that whose replacement costs more
    recall wins, then the lower index. Ties are common in the HALO score of small suites: it is capped, and every
    layer that costs no commonsense at all reaches the cap.
    uniform: the last layer of every group of L / k, as hybrids interleave them (3, 7, 11, ... at k = L / 4).
    last_half: the same spacing within layers [L // 2, L) (every second layer at k = L / 4).
    all_rnn: none, whatever `num_attention_layers` says.
    Raises ValueError for an unknown method or for more layers than there is room for.
    """
    num_layers = sweep.num_layers
    count = num_layers // 4 if num_attention_layers is None else num_attention_layers
    first = num_layers // 2 if method == "last_half" else 0
    if method not in METHODS:
        raise ValueError(f"unknown selection method {method!r}; choose one of {', '.join(METHODS)}")
    if method == "all_rnn":
        return ()
    if not 0 <= count <= num_layers - first:
        raise ValueError(
            f"{method} cannot choose {count} attention layers: it has room for 0 to {num_layers - first} "
            f"of {num_layers}"
        )
    importance = layer_importance(method, sweep)
    if importance is None:
        return evenly_spaced_layers(first, num_layers, count)
    recall = [score.recall for score in sweep.layers]
    ranking = sorted(range(num_layers), key=lambda layer: (-importance[layer], recall[layer], layer))
    return tuple(sorted(ranking[:count]))


def all_choices(sweep: LayerSweep, num_attention_layers: int | None = None) -> dict[Method, tuple[int, ...]]:
    """What every method would choose; KL is left out of a sweep that did not measure it."""
    measured_kl = all(score.kl is not None for score in sweep.layers)
    return {
        method: choose_attention_layers(method, sweep, num_attention_layers)
        for method in METHODS
        if method != "kl" or measured_kl
    }


def sweep_from_published(json_path: Path, model: str) -> LayerSweep:
    """The HypeNet authors' sweep of `model` ("2b", "4b", "8b") from a JSON file of per-layer task scores.

    C is the mean of HellaSwag, ARC-Easy and ARC-Challenge, R that of SQuAD, FDA and SWDE; there is no KL.
    Raises ValueError when the file is missing or lacks the model or one of its tasks.
    """
    models: Mapping[str, Any] = read_json(json_path)["models"]
    if model not in models:
        raise ValueError(f"{json_path} has no model {model!r}; choose one of {', '.join(models)}")
    try:
        layers = tuple(
            LayerScore(index, *_recall_and_commonsense(scores))
            for index, scores in enumerate(models[model]["layers"])
        )
        return LayerSweep(layers, *_recall_and_commonsense(models[model]["teacher"]))
    except KeyError as error:
        raise ValueError(f"{json_path} lacks {error} for model {model!r}; restore the file") from None


def _recall_and_commonsense(scores: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    recall, commonsense = scores["recall"], scores["csr"]
    return (
        (recall["ruler_qa_squad"] + recall["fda"] + recall["swde"]) / 3,
        (commonsense["hellaswag"] + commonsense["arc_easy"] + commonsense["arc_challenge"]) / 3,
    )
