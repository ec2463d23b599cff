"""Selects the layers that keep attention, from the scores of a layer sweep.

M(i) is the teacher with only layer i (counted from 0) replaced by its aligned student mixer. R_i and C_i in [0, 1] are
the recall and commonsense scores of M(i). A layer is important if M(i) loses recall but little commonsense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Method = Literal["halo", "jet_nemotron", "kl", "uniform", "last_half", "all_rnn"]
METHODS: tuple[Method, ...] = get_args(Method)

HALO_EPSILON = 1e-6
HALO_CAP = 50.0


@dataclass(frozen=True)
class LayerScore:
    """Scores of M(layer): recall and commonsense in [0, 1]; kl in nats per token, or None if not measured."""

    layer: int
    recall: float
    commonsense: float
    kl: float | None = None


@dataclass(frozen=True)
class LayerSweep:
    """One LayerScore per layer, in order, and the scores of the unchanged teacher.

    `commonsense_error` is the standard error of a commonsense score; 0 for suites so large that it is negligible.
    Raises ValueError if a layer is missing, repeated or out of order, or if a score is not finite.
    """

    layers: tuple[LayerScore, ...]
    teacher_recall: float
    teacher_commonsense: float
    commonsense_error: float = 0.0

    def __post_init__(self) -> None:
        indices = [score.layer for score in self.layers]
        if not indices or indices != list(range(len(indices))):
            raise ValueError(
                f"the layer sweep must score layers 0, 1, 2, ... once each, but has {indices}; sweep again"
            )
        for score in self.layers:
            measured = [score.recall, score.commonsense, 0.0 if score.kl is None else score.kl]
            if not all(math.isfinite(value) for value in measured):
                raise ValueError(
                    f"the layer sweep has a score of layer {score.layer} that is not finite: {score}; sweep again"
                )

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def halo_importance(sweep: LayerSweep) -> tuple[float, ...]:
    """s_i = min(50, (max_j R_j - R_i) / (max_j C_j - C_i + epsilon)); maxima over all M(j). Source: arXiv 2601.22156.

    The published epsilon is 1e-6, for suites of ten thousand items. With a few hundred items, the layer that happens to
    have the largest C has the denominator 1e-6, and reaches the cap with any loss of recall. We add the standard error
    of C, so that no difference in C counts as smaller than the resolution of the suite.
    """
    best_recall = max(score.recall for score in sweep.layers)
    best_commonsense = max(score.commonsense for score in sweep.layers)
    epsilon = HALO_EPSILON + sweep.commonsense_error
    return tuple(
        min(HALO_CAP, (best_recall - score.recall) / (best_commonsense - score.commonsense + epsilon))
        for score in sweep.layers
    )


def jet_nemotron_importance(sweep: LayerSweep) -> tuple[float, ...]:
    """max_j R_j - R_i: the loss of recall when layer i is replaced. Source: Jet-Nemotron, arXiv 2508.15884."""
    best_recall = max(score.recall for score in sweep.layers)
    return tuple(best_recall - score.recall for score in sweep.layers)


def kl_importance(sweep: LayerSweep) -> tuple[float, ...]:
    """KL(teacher || M(i)) in nats per token; ValueError if the sweep did not measure it."""
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
    """Importance of every layer, or None for methods that do not use scores. The highest keep attention."""
    return _IMPORTANCE[method](sweep) if method in _IMPORTANCE else None


def evenly_spaced_layers(first: int, end: int, count: int) -> tuple[int, ...]:
    """The last layer of each of `count` groups of about equal size that divide layers [first, end)."""
    return tuple(first + (group + 1) * (end - first) // count - 1 for group in range(count))


def choose_attention_layers(
    method: Method, sweep: LayerSweep, num_attention_layers: int | None = None
) -> tuple[int, ...]:
    """The k layers that keep attention, ascending. k is `num_attention_layers`, by default floor(L / 4).

    halo, jet_nemotron, kl: the most important layers. A tie goes to the layer whose replacement loses more recall, then
    to the lower index. Ties are common in the HALO score of small suites, because every layer that costs no commonsense
    reaches its cap.
    uniform: the last layer of every L / k layers, as in interleaved hybrids (3, 7, 11, ... for k = L / 4).
    last_half: the same spacing within layers [L // 2, L) (every second layer for k = L / 4).
    all_rnn: no layer, whatever `num_attention_layers` is.
    Raises ValueError for an unknown method or too many layers.
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
            f"{method} cannot select {count} of {num_layers} layers; choose 0 to {num_layers - first}"
        )
    importance = layer_importance(method, sweep)
    if importance is None:
        return evenly_spaced_layers(first, num_layers, count)
    recall = [score.recall for score in sweep.layers]
    ranking = sorted(range(num_layers), key=lambda layer: (-importance[layer], recall[layer], layer))
    return tuple(sorted(ranking[:count]))


def all_choices(sweep: LayerSweep, num_attention_layers: int | None = None) -> dict[Method, tuple[int, ...]]:
    """The layers that every method would select. kl is left out if the sweep did not measure it."""
    measured_kl = all(score.kl is not None for score in sweep.layers)
    return {
        method: choose_attention_layers(method, sweep, num_attention_layers)
        for method in METHODS
        if method != "kl" or measured_kl
    }
