"""The layer sweep against L + 1 separate full forward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from halo_evaluation.interface import ScoreBatch
from halo_evaluation.selection.sweep import LayerSwitch, layer_groups
from hypenet_megatron.alignment import Route
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel
from hypenet_megatron.presets import ModelShape
from hypenet_megatron.runtime import model_parallel

SHAPE = ModelShape("tiny", 4, 48, 80, 4, 2, 16, 96, tied_embeddings=True)


@pytest.fixture
def model():
    with model_parallel(seed=2):
        config = DecoderConfig.from_shape(SHAPE, SHAPE.teacher_mixers(), init_method_std=0.15)
        yield DecoderModel(config, student="lightning")


@pytest.fixture
def switch(model) -> LayerSwitch:
    return LayerSwitch(model, torch.device("cpu"))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(SHAPE.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _one_by_one(model: DecoderModel, ids: Tensor) -> list[Tensor]:
    """Log-probabilities [b, s, vocabulary] of the teacher and of each M(i), each by a separate pass."""
    model.eval()
    found = []
    for replaced in (None, *range(SHAPE.num_layers)):
        for layer, mixer in enumerate(model.aligned_mixers()):
            mixer.route = Route.STUDENT if layer == replaced else Route.TEACHER
        found.append(model.logits(model(ids)).transpose(0, 1).log_softmax(-1))
    model.set_route(Route.TEACHER)
    return found


def test_logits(model, switch, ids):
    expected = _one_by_one(model, ids)
    with torch.no_grad():
        found = [model.logits(hidden).transpose(0, 1).log_softmax(-1) for hidden in switch.final_hidden(ids)]
    assert len(found) == SHAPE.num_layers + 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    for layer in range(SHAPE.num_layers):
        assert (found[layer + 1] - found[0]).abs().max() > 1e-3, "students that differ from their teachers"


def test_divergence(model, switch, ids):
    teacher, *replaced = _one_by_one(model, ids)
    expected = [float((teacher.exp() * (teacher - one)).sum(-1).mean()) for one in replaced]
    assert min(expected) > 1e-4
    assert switch.divergence(ids) == pytest.approx(expected, rel=1e-4)


def test_scores(model, switch, ids):
    mask = np.zeros(ids.shape, bool)
    mask[0, 3:9] = mask[1, 19] = mask[2, 1] = True
    scores = switch.score(ScoreBatch(ids.numpy(), mask))
    for score, log_probabilities in zip(scores, _one_by_one(model, ids), strict=True):
        chosen = log_probabilities[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].numpy()
        expected = np.where(mask[:, 1:], chosen, 0)
        np.testing.assert_allclose(score.log_probability[:, 1:], expected, rtol=0, atol=1e-5)
        is_greedy = (log_probabilities[:, :-1].argmax(-1) == ids[:, 1:]).numpy() & mask[:, 1:]
        np.testing.assert_array_equal(score.is_greedy[:, 1:], is_greedy)


def test_sweep_starts_from_the_teacher_whatever_ran_before(model, switch, ids):
    expected = switch.divergence(ids)
    model.set_route(Route.STUDENT)
    assert switch.divergence(ids) == expected
    assert {mixer.route for mixer in model.aligned_mixers()} == {Route.TEACHER}


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_groups_of_layers_give_the_same_bits(model, switch, ids, groups):
    mask = np.zeros(ids.shape, bool)
    mask[0, 3:9] = mask[1, 19] = True
    batch = ScoreBatch(ids.numpy(), mask)
    expected, divergence = switch.score(batch), switch.divergence(ids)
    found, parts = [], []
    for group in layer_groups(SHAPE.num_layers, groups):
        found += switch.score(batch, group, teacher=group.start == 0)
        parts += switch.divergence(ids, group)
    assert parts == divergence
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.log_probability, other.log_probability)
        np.testing.assert_array_equal(one.is_greedy, other.is_greedy)


def test_group_passes_no_layer_above_in_vain(model, switch, ids):
    passed = []
    for number, layer in enumerate(model.decoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: passed.append(number))
    with torch.no_grad():
        list(switch.final_hidden(ids, range(1, 3), teacher=False))
    assert passed == [0, 1] + [1, 2, 3] + [2, 3]


@pytest.mark.parametrize("layers", [1, 4, 28, 36])
@pytest.mark.parametrize("groups", [1, 2, 3, 7, 40])
def test_groups_are_whole_and_balanced(layers, groups):
    found = layer_groups(layers, groups)
    assert [layer for group in found for layer in group] == list(range(layers))
    assert len(found) == min(groups, layers)
    costs = [sum(layers - layer for layer in group) for group in found]
    assert max(costs) <= sum(costs) / len(costs) + layers
