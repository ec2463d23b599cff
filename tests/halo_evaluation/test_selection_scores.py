"""Layer rankings: published scores give the published layers, and every formula ranks as documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halo_evaluation.selection.scores import (
    HALO_CAP,
    LayerScore,
    LayerSweep,
    all_choices,
    choose_attention_layers,
    halo_importance,
    jet_nemotron_importance,
)

PUBLISHED_SCORES = Path(__file__).resolve().parents[3] / "shared" / "data" / "sweep_scores.json"


def published_sweep(model: str) -> LayerSweep:
    """The authors' sweep of `model`: C is the mean of three tasks, R that of three others."""
    scores = json.loads(PUBLISHED_SCORES.read_text())["models"][model]

    def recall_and_commonsense(row: dict[str, dict[str, float]]) -> tuple[float, float]:
        recall, commonsense = row["recall"], row["csr"]
        return (
            (recall["ruler_qa_squad"] + recall["fda"] + recall["swde"]) / 3,
            (commonsense["hellaswag"] + commonsense["arc_easy"] + commonsense["arc_challenge"]) / 3,
        )

    layers = (LayerScore(i, *recall_and_commonsense(row)) for i, row in enumerate(scores["layers"]))
    return LayerSweep(tuple(layers), *recall_and_commonsense(scores["teacher"]))


def sweep_of(recall: list[float], commonsense: list[float], kl: list[float] | None = None) -> LayerSweep:
    layers = tuple(
        LayerScore(index, recall[index], commonsense[index], None if kl is None else kl[index])
        for index in range(len(recall))
    )
    return LayerSweep(layers, teacher_recall=0.9, teacher_commonsense=0.6)


def flat_sweep(num_layers: int) -> LayerSweep:
    return sweep_of([0.5] * num_layers, [0.5] * num_layers, [0.1] * num_layers)


@pytest.mark.parametrize(
    ("model", "attention_layers"),
    [
        ("2b", (2, 3, 6, 8, 9, 21, 25)),  # as released in hypenet-2b
        ("4b", (0, 1, 7, 14, 15, 22, 24, 33, 34)),  # hypenet-5b was released with 31 in place of 34
        ("8b", (1, 2, 4, 6, 7, 10, 24, 33, 34)),  # as released in hypenet-9b
    ],
)
def test_published_sweeps_give_published_layers(model: str, attention_layers: tuple[int, ...]) -> None:
    if not PUBLISHED_SCORES.is_file():
        pytest.skip(f"the authors' published sweep scores are not at {PUBLISHED_SCORES}")
    assert choose_attention_layers("halo", published_sweep(model)) == attention_layers


def test_halo_importance_by_hand() -> None:
    sweep = sweep_of(recall=[0.8, 0.6, 0.7, 0.4], commonsense=[0.50, 0.45, 0.60, 0.20])
    expected = [0.0, 0.2 / (0.15 + 1e-6), HALO_CAP, 0.4 / (0.4 + 1e-6)]
    assert halo_importance(sweep) == pytest.approx(expected, rel=1e-9)
    assert choose_attention_layers("halo", sweep) == (2,)
    assert choose_attention_layers("halo", sweep, 2) == (1, 2)


def test_the_teacher_does_not_enter_the_maxima() -> None:
    layers = (LayerScore(0, 0.5, 0.5), LayerScore(1, 0.25, 0.25))
    sweeps = [LayerSweep(layers, teacher, teacher) for teacher in (0.0, 1.0)]
    assert halo_importance(sweeps[0]) == halo_importance(sweeps[1])
    assert jet_nemotron_importance(sweeps[1]) == (0.0, 0.25)


def test_jet_nemotron_and_kl_rank_by_their_own_score() -> None:
    sweep = sweep_of([0.9, 0.1, 0.5, 0.8], [0.5, 0.1, 0.5, 0.5], [0.3, 0.2, 0.1, 0.4])
    assert choose_attention_layers("jet_nemotron", sweep, 2) == (1, 2)
    assert choose_attention_layers("kl", sweep, 2) == (0, 3)


def test_ties_go_to_the_lower_layer() -> None:
    assert choose_attention_layers("halo", flat_sweep(8), 3) == (0, 1, 2)
    assert choose_attention_layers("kl", flat_sweep(8)) == (0, 1)


def test_fixed_patterns() -> None:
    assert choose_attention_layers("uniform", flat_sweep(28)) == (3, 7, 11, 15, 19, 23, 27)
    assert choose_attention_layers("last_half", flat_sweep(28)) == (15, 17, 19, 21, 23, 25, 27)
    assert choose_attention_layers("uniform", flat_sweep(10), 3) == (2, 5, 9)
    assert choose_attention_layers("last_half", flat_sweep(9), 2) == (5, 8)
    assert choose_attention_layers("all_rnn", flat_sweep(28), 7) == ()


@pytest.mark.parametrize("method", ["halo", "kl", "uniform", "last_half"])
def test_no_layer_and_every_layer_can_be_asked_for(method: str) -> None:
    assert choose_attention_layers(method, flat_sweep(8), 0) == ()
    first = 4 if method == "last_half" else 0
    assert choose_attention_layers(method, flat_sweep(8), 8 - first) == tuple(range(first, 8))


def test_all_choices_leave_out_kl_where_it_was_not_measured() -> None:
    measured = all_choices(flat_sweep(8))
    assert list(measured) == ["halo", "jet_nemotron", "kl", "uniform", "last_half", "all_rnn"]
    assert "kl" not in all_choices(sweep_of([0.5] * 8, [0.5] * 8))


def test_user_errors_are_sentences() -> None:
    with pytest.raises(ValueError, match="unknown selection method 'haloo'; choose one of halo"):
        choose_attention_layers("haloo", flat_sweep(8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"last_half cannot select 5 of 8 layers; choose 0 to 4"):
        choose_attention_layers("last_half", flat_sweep(8), 5)
    with pytest.raises(ValueError, match="no KL for layer 0"):
        choose_attention_layers("kl", sweep_of([0.5] * 4, [0.5] * 4))
    with pytest.raises(ValueError, match="not finite"):
        sweep_of([float("nan")] * 4, [0.5] * 4)
    with pytest.raises(ValueError, match="once each"):
        LayerSweep((LayerScore(1, 0.5, 0.5),), 0.9, 0.6)


def test_capped_ties_go_to_the_layer_whose_loss_costs_more_recall():
    """Layers 1 to 3 lose recall but no commonsense, so all reach the cap. The index alone would select layer 1."""
    recalls = (1.0, 0.9, 0.2, 0.5)
    sweep = LayerSweep(tuple(LayerScore(i, recall, 0.6) for i, recall in enumerate(recalls)), 1.0, 0.6)
    assert halo_importance(sweep)[1:] == (50.0, 50.0, 50.0)
    assert choose_attention_layers("halo", sweep, 1) == (2,)


def test_noise_in_commonsense_does_not_outrank_lost_recall():
    """Layer 0 has the best C of a noisy suite and loses 1 % of recall. Layer 2 loses all of it."""
    scores = ((0.987, 0.448), (0.999, 0.442), (0.0, 0.361), (0.883, 0.431))
    layers = tuple(LayerScore(i, recall, commonsense) for i, (recall, commonsense) in enumerate(scores))
    as_published = LayerSweep(layers, 0.999, 0.436)
    assert choose_attention_layers("halo", as_published, 1) == (0,)
    with_error = LayerSweep(layers, 0.999, 0.436, commonsense_error=0.0155)
    assert choose_attention_layers("halo", with_error, 2) == (2, 3)
