"""What one layout saved, another loads: the same tensors, and the training goes on as if nothing had happened.

`make test` takes layouts of every kind as source of themselves and of another; `make test-grid` every pair of more.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from hypenet_megatron.runtime import ParallelLayout, model_parallel
from hypenet_tools.model_weights import read_weights
from tests.support.resume_grid import SAVED_STEP, Task, World, checkpoint_tensors, losses, run
from tests.support.training_grid import SECTION, save_whole_weights

TOLERANCE = 1e-6  # relative for losses, absolute for weights, which are of order one
ALIGNED = [  # checkpoints of students alone
    World(2, ParallelLayout(tensor=2), "align"),
    World(2, ParallelLayout(pipeline=2, distributed_optimizer=True), "align"),
]
COVERING = [
    World(1, ParallelLayout()),
    World(2, ParallelLayout(tensor=2)),
    World(2, ParallelLayout(distributed_optimizer=True)),
    World(2, ParallelLayout(pipeline=2)),
    World(2, ParallelLayout(tensor=2, sequence_parallel=True)),
    World(2, ParallelLayout(context=2)),
    World(2, ParallelLayout(pipeline=2, virtual_pipeline=2)),
    World(2, ParallelLayout(distributed_optimizer=True, overlap=True)),
    World(4, ParallelLayout(tensor=2, pipeline=2)),
]
WORLDS = [
    *COVERING,
    World(2, ParallelLayout()),
    World(2, ParallelLayout(pipeline=2, first_stage_layers=1)),
    World(4, ParallelLayout(tensor=2, context=2)),
    World(4, ParallelLayout(tensor=2, distributed_optimizer=True)),
]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="gloo ranks on the CPU backend; with CUDA it is off"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    with model_parallel(seed=1):
        save_whole_weights(folder)
    return folder


def _assert_same_tensors(task: Task, root: Path) -> None:
    """What was loaded and saved again is what was saved, to the bit, whatever the layout."""
    assert task.source is not None
    saved, again = (
        checkpoint_tensors(folder / f"step-{SAVED_STEP:08d}")
        for folder in (Task(task.source).folder(root) / "checkpoints", task.folder(root) / "again")
    )
    assert saved.keys() == again.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in saved)
    assert [key for key in saved if not saved[key].equal(again[key])] == []


def _deviations(task: Task, root: Path) -> tuple[float, float]:
    """Of the losses and final weights of `task` from those of the uninterrupted training of its source."""
    assert task.source is not None
    expected, found = losses(Task(task.source), root)[SAVED_STEP:], losses(task, root)
    assert len(found) == len(expected) == SECTION.steps - SAVED_STEP
    uninterrupted, resumed = (read_weights(each.folder(root) / "final") for each in (Task(task.source), task))
    assert uninterrupted.keys() == resumed.keys()
    return (
        max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True)),
        max(float((uninterrupted[key] - resumed[key]).abs().max()) for key in resumed),
    )


def _check_all(pairs: list[tuple[World, World]], weights: Path, root: Path) -> None:
    """Uninterrupted trainings of all sources, each with its checkpoint of step 3; then every (source, world)."""
    run([Task(source) for source in dict.fromkeys(source for source, _ in pairs)], weights, root)
    tasks = [Task(world, source) for source, world in pairs]
    run(tasks, weights, root)
    apart = {}
    with model_parallel(seed=1):
        for task in tasks:
            _assert_same_tensors(task, root)
            loss, weight = _deviations(task, root)
            print(f"{task.folder(root).name:100s} loss {loss:.1e}  weights {weight:.1e}")
            tolerance = 0.0 if task.source == task.world else TOLERANCE
            if not (loss <= tolerance and weight <= tolerance):
                apart[task.folder(root).name] = (loss, weight)
    assert apart == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_layout_is_left_and_entered(weights, tmp_path):
    same = list(zip(COVERING, COVERING, strict=True))
    moved = list(zip(COVERING, COVERING[1:] + COVERING[:1], strict=True))
    _check_all([*same, *moved, *itertools.permutations(ALIGNED)], weights, tmp_path)


@pytest.mark.grid
@pytest.mark.timeout(3000)
def test_every_pair(weights, tmp_path):
    _check_all([*itertools.product(WORLDS, WORLDS), *itertools.product(ALIGNED, ALIGNED)], weights, tmp_path)
