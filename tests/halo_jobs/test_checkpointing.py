"""Training checkpoints as files and tensors: rectangles, masters, what is kept, what is refused, nothing unpickled."""

from __future__ import annotations

import itertools
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from durable_files import FolderManifest, read_json, sha256_file, write_json
from halo_jobs.recipe import TrainingSection
from halo_training.checkpointing import BackgroundSaver, TrainingCheckpoints
from halo_training.checkpointing.random_states import random_states, restore_random_states
from halo_training.checkpointing.state import flat_boxes, training_shards
from halo_training.objectives import NextTokenObjective
from halo_training.optimizer import build_optimizer
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel
from hypenet_megatron.presets import ModelShape
from hypenet_megatron.runtime import ParallelLayout, model_parallel, reset_seeds
from sharded_tensors.views import TensorsInMemory
from sharded_tensors.writer import FileTensor, TensorFile, aligned
from tests.support.resume_grid import checkpoint_tensors

SHAPE = ModelShape("tiny", 2, 32, 48, 4, 2, 8, 64, tied_embeddings=True)
SECTION = TrainingSection(steps=4, context_length=16, global_batch=4, micro_batch=2, learning_rate=1e-3)


@pytest.fixture
def world():
    with model_parallel(seed=1):
        yield


class _Run:
    """A model with its optimizer, three updates old."""

    def __init__(self, *, distributed: bool = False, dtype: torch.dtype = torch.float32, seed: int = 3):
        reset_seeds(seed)
        config = DecoderConfig.from_shape(SHAPE, SHAPE.hybrid_mixers((1,), "lightning"), dtype=dtype)
        self.objective = NextTokenObjective(
            DecoderModel(config), ParallelLayout(distributed_optimizer=distributed)
        )
        self.model = self.objective.model
        self.optimizer = build_optimizer(self.objective.chunks, SECTION)

    def update(self, times: int = 3) -> _Run:
        for step in range(times):
            generator = torch.Generator().manual_seed(step)
            for chunk in self.objective.chunks:
                chunk.zero_grad_buffer()
            for parameter in self.model.parameters():
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
            self.optimizer.step()
        return self

    def save(self, folder: Path, step: int = 3, **settings: int) -> TrainingCheckpoints:
        checkpoints = TrainingCheckpoints(folder, **settings)
        saver = BackgroundSaver(checkpoints, None)
        training = {"step": step, "optimizer_step": 3, "layout": {}}
        saver.begin(step, self.model, self.optimizer, training)
        saver.finish()
        saver.wait_for_removal()
        return checkpoints

    def load(self, checkpoints: TrainingCheckpoints, step: int = 3) -> _Run:
        checkpoints.load(step, self.model, self.optimizer, None)
        return self


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.floats(0, 1), st.floats(0, 1))
def test_boxes_are_the_range_in_order(shape, first, second):
    numbers = np.arange(np.prod(shape)).reshape(shape)
    start, stop = sorted(round(x * numbers.size) for x in (first, second))
    boxes = list(flat_boxes(shape, start, stop))
    places = [tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True)) for offsets, sizes in boxes]
    found = [numbers[place].reshape(-1) for place in places]
    assert np.concatenate([[], *found]).tolist() == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("saved", "loaded"), itertools.product([False, True], repeat=2))
def test_kinds_of_optimizer_read_each_other(world, tmp_path, saved, loaded, dtype):
    """With and without the distributed optimizer: the same tensors under the same keys, and the same next update."""
    run = _Run(distributed=saved, dtype=dtype).update()
    checkpoints = run.save(tmp_path / "a")
    other = _Run(distributed=loaded, dtype=dtype, seed=4).load(checkpoints)
    other.save(tmp_path / "b")
    a, b = (checkpoint_tensors(tmp_path / name / "step-00000003") for name in "ab")
    assert a.keys() == b.keys()
    assert [key for key in a if not a[key].equal(b[key])] == []
    assert any(key.startswith("optimizer.state.fp32_param.") for key in a) == (dtype == torch.bfloat16)
    run.update(1), other.update(1)
    assert all(x.equal(y) for x, y in zip(run.model.parameters(), other.model.parameters(), strict=True))


def test_optimizer_steps_are_counted_apart(world, tmp_path):
    """One tensor for all parameters would count each of their updates."""
    checkpoints = _Run().update().save(tmp_path)
    run = _Run(seed=4).load(checkpoints).update(1)
    inner = run.optimizer.chained_optimizers[0].optimizer
    assert {float(state["step"]) for state in inner.state.values()} == {4.0}


def test_random_states_go_on(world):
    states = random_states()

    def draw() -> list[float]:
        return [random.random(), random.gauss(), float(np.random.normal()), float(torch.rand(()))]

    first, second = draw(), draw()
    assert first != second
    restore_random_states(states)
    assert draw() == first


def test_random_states_are_those_of_the_rank_that_saved(world, tmp_path):
    run = _Run().update()
    checkpoints = run.save(tmp_path)
    assert checkpoints.path(3).joinpath("TRAINING.json").exists()
    stored = load_file(checkpoints.path(3) / "rank-00000.safetensors")
    assert all(
        stored[f"random.0.{name}"].equal(state)
        for name, state in random_states().items()
        if not name.startswith("tracker.")
    )


def test_old_checkpoints_go_and_milestones_stay(world, tmp_path):
    run = _Run().update()
    for step in range(1, 10):
        checkpoints = run.save(tmp_path, step, keep_last=2, keep_every=4)
    assert checkpoints.steps() == [4, 7, 8, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (4, 7, 8, 9)]


def test_what_is_saved_is_the_state_at_the_time(world, tmp_path):
    """Training goes on while the thread writes."""
    run = _Run().update()
    before = {shard.key: shard.data.clone() for shard in training_shards(run.model, run.optimizer, None)}
    saver = BackgroundSaver(TrainingCheckpoints(tmp_path), None)
    saver.begin(3, run.model, run.optimizer, {})
    run.update(2)
    saver.finish()
    saved = checkpoint_tensors(tmp_path / "step-00000003")
    whole = {key: tensor for key, tensor in before.items() if tensor.shape == saved[key].shape}
    assert len(whole) > 20
    assert [key for key in whole if not whole[key].equal(saved[key])] == []


def test_files_are_what_the_library_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "empty": torch.empty(0, dtype=torch.float64),
        "c": torch.arange(3, dtype=torch.uint8),
    }
    view = TensorsInMemory(tensors)
    file = TensorFile("x.safetensors", aligned(FileTensor.entire(view, name) for name in view))
    size, digest = file.write(tmp_path)
    assert (size, digest) == (
        (tmp_path / "x.safetensors").stat().st_size,
        sha256_file(tmp_path / "x.safetensors"),
    )
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


class _Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('a checkpoint was unpickled')",)


def test_nothing_is_unpickled(world, tmp_path, monkeypatch):
    """Neither on the way to a good checkpoint nor if somebody puts a pickle in the place of each file."""
    checkpoints = _Run().update().save(tmp_path)
    folder = checkpoints.path(3)
    assert not [path for path in folder.iterdir() if path.suffix not in {".json", ".safetensors"}]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    other = _Run(seed=4)
    for module, name in ((pickle, "load"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    other.load(checkpoints)
    trap = pickle.dumps(_Trap())
    for path in sorted(path for path in folder.iterdir() if path.name != FolderManifest.FILE_NAME):
        content = path.read_bytes()
        path.write_bytes(trap)
        FolderManifest.write(folder)  # as an attacker would
        with pytest.raises(ValueError, match=path.name):
            other.load(checkpoints)
        path.write_bytes(content)
    (folder / FolderManifest.FILE_NAME).write_bytes(trap)
    assert checkpoints.newest_valid()[0] is None


def test_index_that_names_a_file_elsewhere(world, tmp_path):
    checkpoints = _Run().update().save(tmp_path)
    index = checkpoints.path(3) / "TENSORS.json"
    content = read_json(index)
    next(iter(content["tensors"].values()))["rectangles"][0]["file"] = "../../secret.safetensors"
    write_json(index, content)
    with pytest.raises(ValueError, match="not a safetensors file of its own folder"):
        _Run().load(checkpoints)


def test_checkpoint_of_another_model(world, tmp_path):
    checkpoints = _Run().update().save(tmp_path)
    for path in (checkpoints.path(3) / "TENSORS.json", checkpoints.path(3) / "rank-00000.safetensors"):
        path.write_bytes(path.read_bytes().replace(b"decoder.layers.1.", b"decoder.layers.7."))
    with pytest.raises(ValueError, match=r"lacks the tensor decoder\.layers\.1\."):
        _Run().load(checkpoints)


def test_checkpoints_of_an_earlier_version_stop_the_stage_in_one_sentence(world, tmp_path):
    """They are not taken for damaged ones: training would begin again without a word."""
    checkpoints = _Run().update().save(tmp_path)
    (checkpoints.path(3) / "TENSORS.json").rename(checkpoints.path(3) / "INDEX.json")
    with pytest.raises(ValueError, match=r"step-00000003 was written by an earlier version of hypenet-megatron"):
        checkpoints.newest_valid()
