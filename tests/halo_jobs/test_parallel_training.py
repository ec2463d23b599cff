"""Every stage under every layout gives the numbers of one process: losses and gradient norms of five steps, and the
trained weights.

`make test` runs every layout of the grid with every kind of training, tied and untied heads taking turns; `make
test-grid` the whole, and more layouts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hypenet_megatron.runtime import model_parallel
from hypenet_tools.model_weights import read_weights
from tests.support.training_grid import (
    FRESH,
    KINDS,
    LAYOUTS,
    MORE_LAYOUTS,
    SECTION,
    SINGLE,
    TRAINED,
    Cell,
    numbers,
    save_whole_weights,
    train,
    train_in_ranks,
)

LOSS_TOLERANCE, NORM_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 1e-5, 1e-5  # relative
GRID = [Cell(kind, tied, SINGLE) for kind in KINDS for tied in (True, False)]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="gloo ranks on the CPU backend; with CUDA it is off"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    with model_parallel(seed=1):
        save_whole_weights(folder)
    return folder


@pytest.fixture(scope="module")
def single(weights, tmp_path_factory) -> Path:
    """Where the numbers of one process lie."""
    folder = tmp_path_factory.mktemp("single")
    with model_parallel(seed=1):
        for cell in GRID:
            train(cell, weights, folder)
    return folder


def _deviations(cells: list[Cell], folder: Path, single: Path) -> dict[str, tuple[float, float]]:
    """By cell, the largest relative deviation of loss and of gradient norm over the steps."""
    found = {}
    for cell in cells:
        expected = numbers(Cell(cell.kind, cell.tied, SINGLE), single)
        here = numbers(cell, folder)
        assert here.shape == expected.shape == (SECTION.steps, 2)
        loss, norm = np.max(np.abs(here - expected) / np.abs(expected), axis=0)
        found[cell.name] = (float(loss), float(norm))
        print(f"{cell.name:75s} loss {loss:.1e}  gradient norm {norm:.1e}")
    return found


def _assert_equal_to_single(ranks: int, cells: list[Cell], weights: Path, single: Path, folder: Path):
    assert len({cell.name for cell in cells}) == len(cells)
    train_in_ranks(ranks, cells, weights, folder)
    deviations = _deviations(cells, folder, single)
    apart = {
        name: (loss, norm)
        for name, (loss, norm) in deviations.items()
        if not (loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE)
    }
    assert apart == {}
    for cell in cells:
        if cell.kind == "pretrain":
            _assert_same_start(cell, folder, single)
        _assert_same_end(cell, folder, single)


def _both(cell: Cell, which: str, folder: Path, single: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a cell, and those of one process."""
    here = read_weights(folder / cell.name / which)
    expected = read_weights(single / Cell(cell.kind, cell.tied, SINGLE).name / which)
    assert here.keys() == expected.keys()
    return here, expected


def _assert_same_start(cell: Cell, folder: Path, single: Path):
    """Fresh weights are those of one process, bit for bit."""
    here, expected = _both(cell, FRESH, folder, single)
    assert [name for name in expected if not here[name].equal(expected[name])] == [], cell.name


def _assert_same_end(cell: Cell, folder: Path, single: Path):
    """Trained weights are those of one process, within float noise."""
    here, expected = _both(cell, TRAINED, folder, single)
    apart = {name: float((here[name] - x).norm() / x.norm()) for name, x in expected.items()}
    print(f"{cell.name:75s} weights {max(apart.values()):.1e}")
    assert {name: far for name, far in apart.items() if not far <= WEIGHT_TOLERANCE} == {}, cell.name


def test_fresh_weights_are_drawn_as_megatron_draws_them(single):
    """Normal with its two standard deviations, norms of one, no two matrices alike."""
    fresh = read_weights(single / Cell("pretrain", False, SINGLE).name / FRESH)
    spread = {name: float(fresh[name].std()) for name in fresh if fresh[name].dim() == 2}
    into_the_stream = {name for name in spread if "linear_proj" in name or "linear_fc2" in name}
    assert len(into_the_stream) == 8
    for name, deviation in spread.items():
        expected = 0.02 / (2 * 4) ** 0.5 if name in into_the_stream else 0.02
        assert deviation == pytest.approx(expected, rel=0.05), name
    assert len({float(fresh[name].flatten()[0]) for name in spread}) == len(spread)
    assert all(fresh[name].eq(1).all() for name in fresh if fresh[name].dim() == 1)


def test_the_numbers_mean_something(single):
    """Losses that move, that differ between kinds, and between models with tied and untied heads."""
    tables = [numbers(cell, single) for cell in GRID]
    assert all(table.min() > 1e-3 for table in tables)
    assert all(np.ptp(table[:, 0]) > 1e-3 * table[0, 0] for table in tables)
    for number, one in enumerate(tables):
        assert all(not np.allclose(one, other, rtol=1e-3) for other in tables[:number])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_layouts_equal_one_process(weights, single, tmp_path, ranks):
    cells = [
        Cell(kind, (row + column) % 2 == 0, layout)
        for row, layout in enumerate(LAYOUTS[ranks])
        for column, kind in enumerate(KINDS)
    ]
    _assert_equal_to_single(ranks, cells, weights, single, tmp_path)


@pytest.mark.grid
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_whole_grid(weights, single, tmp_path, ranks):
    layouts = [*LAYOUTS.get(ranks, []), *MORE_LAYOUTS[ranks]]
    cells = [Cell(kind, tied, layout) for layout in layouts for kind in KINDS for tied in (True, False)]
    _assert_equal_to_single(ranks, cells, weights, single, tmp_path)
