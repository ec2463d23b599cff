"""The trainer: exact resume, damaged checkpoints, divergence guard, results independent of the micro-batches."""

import io
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from durable_files import read_json
from halo_cluster import StopRequested
from halo_jobs.recipe import TrainingSection
from halo_training.batches import BatchCursor
from halo_training.checkpointing import TrainingCheckpoints
from halo_training.guard import DivergenceGuard, TrainingDiverged
from halo_training.models import is_student_key
from halo_training.objectives import (
    AlignmentObjective,
    DistillationObjective,
    NextTokenObjective,
    wrap_for_gradients,
)
from halo_training.optimizer import build_optimizer
from halo_training.schedule import learning_rate
from halo_training.supervision import Watchdog
from halo_training.trainer import Trainer
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel
from hypenet_megatron.presets import ModelShape
from hypenet_megatron.runtime import model_parallel, reset_seeds
from hypenet_tools.model_weights import load_weights, read_weights, save_weights
from sharded_tensors.writer import TensorFile
from tests.support.windows import RandomWindows

SHAPE = ModelShape("tiny", 4, 32, 48, 4, 2, 8, 64, tied_embeddings=True)
SECTION = TrainingSection(
    steps=8,
    context_length=16,
    global_batch=8,
    micro_batch=4,
    learning_rate=1e-2,
    warmup_steps=2,
    checkpoint_every=3,
)
WINDOWS = RandomWindows(16, 64)


def _objective(kind: str, dtype: torch.dtype):
    reset_seeds(3)
    teacher = DecoderConfig.from_shape(SHAPE, SHAPE.teacher_mixers(), dtype=dtype)
    hybrid = DecoderConfig.from_shape(SHAPE, SHAPE.hybrid_mixers((1,), "lightning"), dtype=dtype)
    if kind == "align":
        return AlignmentObjective(DecoderModel(teacher, student="lightning"))
    if kind == "distill":
        return DistillationObjective(DecoderModel(hybrid), DecoderModel(teacher))
    return NextTokenObjective(DecoderModel(teacher if kind == "pretrain" else hybrid))


def _trainer(folder: Path, kind: str, dtype=torch.float32, section=SECTION, windows=None) -> Trainer:
    cursor = BatchCursor(
        windows or WINDOWS, section.global_batch, section.micro_batch, torch.device("cpu")
    )
    keep = is_student_key if kind == "align" else None
    return Trainer("test", section, _objective(kind, dtype), cursor, folder, Console(quiet=True), keep)


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.fixture
def world():
    with model_parallel(seed=1):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["align", "distill", "finetune", "pretrain"])
def test_resume_is_bit_exact(world, tmp_path, kind, dtype):
    whole = _trainer(tmp_path / "whole", kind, dtype)
    whole.run()
    # Stopped in the middle: the schedule is that of 8 steps, but a NaN in step 8's data ends the run at step 7.
    stopped = _trainer(
        tmp_path / "stopped", kind, dtype, windows=RandomWindows(16, 64, poisoned=60) if kind != "align" else None
    )
    if kind == "align":
        stopped.objective.accumulate = _stop_after(stopped.objective.accumulate, 7)
    with pytest.raises((TrainingDiverged, KeyboardInterrupt)):
        stopped.run()
    resumed = _trainer(tmp_path / "stopped", kind, dtype)
    resumed.run()
    expected, found = _weights(whole), _weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    reference = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in reference]


def _stop_after(accumulate, steps: int):
    calls = iter(range(steps + 1))

    def wrapped(batches):
        if next(calls) == steps:
            raise KeyboardInterrupt
        return accumulate(batches)

    return wrapped


@pytest.mark.parametrize("kind", ["align", "distill", "finetune"])
def test_micro_batches_do_not_change_the_step(world, tmp_path, kind):
    """Also with loss weights that differ between micro-batches."""
    losses = {}
    for micro_batch in (2, 8):
        section = SECTION.model_copy(update={"micro_batch": micro_batch, "learning_rate": 1e-3})
        trainer = _trainer(tmp_path / str(micro_batch), kind, section=section)
        trainer.run()
        lines = (tmp_path / str(micro_batch) / "metrics.jsonl").read_text().splitlines()
        losses[micro_batch] = [(json.loads(x)["loss"], json.loads(x)["gradient_norm"]) for x in lines]
    for a, b in zip(losses[2], losses[8], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_distillation_starts_at_zero_for_equal_models(world):
    reset_seeds(3)
    config = DecoderConfig.from_shape(SHAPE, SHAPE.teacher_mixers())
    teacher, student = DecoderModel(config), DecoderModel(config)
    student.load_state_dict(teacher.state_dict())
    objective = DistillationObjective(student, teacher)
    cursor = BatchCursor(WINDOWS, 4, 2, torch.device("cpu"))
    assert abs(float(objective.accumulate(cursor.batches(0)))) < 1e-6


def test_alignment_trains_students_only(world, tmp_path):
    trainer = _trainer(tmp_path, "align")
    before = _weights(trainer)
    trainer.run()
    after = _weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if is_student_key(name)}


def test_damaged_checkpoint_is_skipped(world, tmp_path):
    whole = _trainer(tmp_path / "whole", "finetune")
    whole.run()
    damaged = _trainer(tmp_path / "damaged", "finetune")
    damaged.run()
    newest = TrainingCheckpoints(tmp_path / "damaged" / "checkpoints").path(6)
    victim = max(newest.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    step, damage = TrainingCheckpoints(tmp_path / "damaged" / "checkpoints").newest_valid()
    assert step == 4
    assert len(damage) == 1 and str(victim) in damage[0]
    resumed = _trainer(tmp_path / "damaged", "finetune")
    resumed.run()
    assert all(
        torch.equal(a, b) for a, b in zip(_weights(whole).values(), _weights(resumed).values(), strict=True)
    )


def test_checkpoint_and_summary_count_the_data_that_was_consumed(world, tmp_path):
    trainer = _trainer(tmp_path, "finetune")
    summary = trainer.run()
    assert 0 < summary["train_seconds"] < 1000 and summary["tokens"] == 8 * SECTION.global_batch * 16
    newest = trainer.checkpoints.steps()[-1]
    state = read_json(trainer.checkpoints.path(newest) / "TRAINING.json")
    assert (state["step"], state["optimizer_step"]) == (newest, newest)
    assert state["consumed_samples"] == newest * SECTION.global_batch
    assert state["consumed_tokens"] == newest * SECTION.global_batch * 16


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_say_what_each_step_did_and_time_goes_on_after_a_resume(world, tmp_path):
    section = SECTION.model_copy(update={"checkpoint_every": 4})
    stopped = _trainer(tmp_path, "finetune", section=section)
    stopped.objective.accumulate = _stop_after(stopped.objective.accumulate, 6)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = _trainer(tmp_path, "finetune", section=section)
    summary = resumed.run()
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["learning_rate"] for line in lines] == [learning_rate(section, step) for step in range(8)]
    assert [line["consumed_samples"] for line in lines] == [8 * step for step in range(1, 9)]
    assert [line["consumed_tokens"] for line in lines] == [128 * step for step in range(1, 9)]
    assert all(line["gradient_norm"] > 0 and line["host_memory_bytes"] > 2**20 for line in lines)
    assert all(line["gpu_memory_bytes"] in (None, 0) or torch.cuda.is_available() for line in lines)
    for first, part in ((0, lines[:4]), (4, lines[4:])):
        before = lines[first - 1]["elapsed_seconds"] if first else 0.0
        for line in part:
            elapsed = line["elapsed_seconds"] - before
            assert line["tokens_per_second"] * elapsed == pytest.approx(128 * (line["step"] - first))
    assert summary["final_loss"] == lines[-1]["loss"]
    assert lines[-1]["elapsed_seconds"] <= summary["train_seconds"] < lines[-1]["elapsed_seconds"] + 60


def test_every_update_waits_for_the_copies_of_a_save_and_every_step_is_reported(world, tmp_path, monkeypatch):
    reported = []
    progress = Watchdog.progress
    monkeypatch.setattr(Watchdog, "progress", lambda self, *done: reported.append(done) or progress(self, *done))
    trainer = _trainer(tmp_path, "finetune", section=SECTION.model_copy(update={"checkpoint_every": 100}))
    steps = []
    trainer.saver.before_update = lambda: steps.append("copies are done")
    monkeypatch.setattr(
        "halo_training.trainer.build_optimizer",
        lambda *arguments: _recording_steps(build_optimizer(*arguments), steps),
    )
    trainer.run()
    assert steps == ["copies are done", "update"] * 8
    assert [done for (done,) in filter(None, reported)] == list(range(9)), "first that training begins"


def _recording_steps(optimizer, steps: list[str]):
    step = optimizer.step
    optimizer.step = lambda: steps.append("update") or step()
    return optimizer


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_only_a_distributed_optimizer_gathers_weights_while_computing(world, distributed_optimizer, overlap):
    model = _objective("finetune", torch.float32).model
    (chunk,) = wrap_for_gradients(model, distributed_optimizer=distributed_optimizer, overlap=overlap)
    config = chunk.ddp_config
    assert config.use_distributed_optimizer == distributed_optimizer
    assert config.overlap_grad_reduce == overlap
    assert config.overlap_param_gather == (distributed_optimizer and overlap)


def test_a_stop_by_file_is_saved_and_does_not_stop_the_next_attempt(world, tmp_path):
    (tmp_path / "stop").touch()
    with pytest.raises(StopRequested, match=r"stopped by the file \S+stop after step 1 of 8, which is saved") as stop:
        _trainer(tmp_path, "finetune").run()
    assert stop.value.by_user
    assert TrainingCheckpoints(tmp_path / "checkpoints").newest_valid() == (1, [])
    assert _trainer(tmp_path, "finetune").run()["steps"] == 8
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 9))


@dataclass
class _Attempt:
    """An attempt at the stage whose inputs have this hash."""

    folder: Path
    input_hash: str

    @property
    def record(self) -> SimpleNamespace:
        return SimpleNamespace(input_hash=self.input_hash)

    def fail(self, reason: str) -> None:
        raise AssertionError(reason)


def test_a_checkpoint_of_other_inputs_is_refused(world, tmp_path):
    def trainer(input_hash: str | None, **settings) -> Trainer:
        trainer = _trainer(tmp_path, "finetune", section=SECTION.model_copy(update=settings))
        trainer.attempt = _Attempt(tmp_path, input_hash) if input_hash else None
        return trainer

    (tmp_path / "stop").touch()
    with pytest.raises(StopRequested):
        trainer("aaaaaaaaaaaa").run()
    with pytest.raises(ValueError, match="saved for the inputs aaaaaaaaaaaa, but these are bbbbbbbbbbbb"):
        trainer("bbbbbbbbbbbb").run()
    with pytest.raises(ValueError, match="saved with steps 8, but the recipe says 9"):
        trainer("aaaaaaaaaaaa", steps=9).run()
    (tmp_path / "stop").touch()
    with pytest.raises(StopRequested, match="after step 2 of 8"):
        trainer("aaaaaaaaaaaa", checkpoint_every=5).run()
    assert trainer(None).run()["steps"] == 8


def test_saves_begin_twice_in_an_interval_and_at_what_is_kept(world, tmp_path):
    begun = []
    section = SECTION.model_copy(update={"checkpoint_every": 6, "keep_checkpoint_every": 7})
    trainer = _trainer(tmp_path, "finetune", section=section)
    begin = trainer.saver.begin
    trainer.saver.begin = lambda step, *state: begun.append(step) or begin(step, *state)
    trainer.run()
    assert begun == [3, 6, 7]
    assert trainer.checkpoints.steps() == [3, 6, 7]
    trainer.checkpoints.set_damaged_aside(3)
    resumed = _trainer(tmp_path, "finetune", section=section)
    resumed.saver.begin = lambda step, *state: begun.append(step)
    resumed.run()
    assert begun[3:] == [6, 7]


def test_long_waits_for_a_save_are_spoken_of(world, tmp_path, monkeypatch):
    write = TensorFile.write

    def slowly(file, folder):
        time.sleep(0.3)
        return write(file, folder)

    monkeypatch.setattr(TensorFile, "write", slowly)
    monkeypatch.setattr("halo_training.trainer._REPORTED_WAIT_SECONDS", 0.1)
    section = SECTION.model_copy(update={"checkpoint_every": 1})  # every step but the last waits for its save
    trainer = _trainer(tmp_path, "finetune", section=section)
    trainer.console = Console(file=io.StringIO(), width=200)
    trainer.run()
    said = re.findall(r"test: waited \d+ s for checkpoint (\d)", trainer.console.file.getvalue())
    assert said == [str(step) for step in range(1, 8)]


def test_nan_stops_and_names_the_batch(world, tmp_path):
    trainer = _trainer(tmp_path, "finetune", windows=RandomWindows(16, 64, poisoned=29))
    with pytest.raises(TrainingDiverged, match=r"loss is nan at step 4 \(samples 24 to 31\)"):
        trainer.run()
    bad = json.loads((tmp_path / "bad_batch.json").read_text())
    assert bad["step"] == 4
    assert [window["sample"] for window in bad["windows"]] == list(range(24, 32))
    assert TrainingCheckpoints(tmp_path / "checkpoints").newest_valid() == (2, [])


def test_spike_stops():
    guard = DivergenceGuard(spike_factor=5.0)
    for step in range(50):
        guard.check_loss(1.0 + 0.01 * step, step=step, samples=(step,))
    guard.check_loss(5.0 * 1.245, step=50, samples=(50,))  # not above the factor
    with pytest.raises(TrainingDiverged, match=r"loss 9 is 7\.2 times the median of recent steps at step 52 ") as stop:
        guard.check_loss(9.0, step=51, samples=(51, 52))
    assert (stop.value.step, stop.value.samples) == (51, (51, 52))
    assert len(guard.recent) == 50, "the oldest goes, and the spike is not counted"


def test_weights_folder_round_trip(world, tmp_path):
    model = _objective("pretrain", torch.bfloat16).model
    save_weights(tmp_path / "weights", model)
    tensors = read_weights(tmp_path / "weights")
    assert all(torch.equal(tensors[name], parameter) for name, parameter in model.named_parameters())
    reset_seeds(99)
    other = DecoderModel(model.config)
    load_weights(tmp_path / "weights", other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("data_ranks", "context_ranks"), [(2, 1), (4, 1), (1, 2), (2, 4)])
def test_any_world_reads_the_batches_of_one_rank(data_ranks, context_ranks):
    """Micro-batches go round the data-parallel ranks in order; context-parallel ranks have slices of the same ones."""
    one = BatchCursor(WINDOWS, 8, 2, torch.device("cpu"))
    ranks = [
        [
            BatchCursor(WINDOWS, 8, 2, torch.device("cpu"), data, data_ranks, context, context_ranks)
            for context in range(context_ranks)
        ]
        for data in range(data_ranks)
    ]
    for step in (0, 1, 7):
        whole = one.batches(step)
        assert len(whole) == 4
        first = torch.from_numpy(WINDOWS.window(8 * step).tokens)
        assert whole[0].input_ids[0].equal(first[:-1]) and whole[0].labels[0].equal(first[1:])
        dealt = [[cursor.batches(step) for cursor in row] for row in ranks]
        for number, expected in enumerate(whole):
            slices = [part[number // data_ranks] for part in dealt[number % data_ranks]]
            for field in ("input_ids", "labels", "loss_weights"):
                assert torch.cat([getattr(part, field) for part in slices], 1).equal(getattr(expected, field))
        assert sum(len(part) for row in dealt for part in row) == len(whole) * context_ranks


def test_batches_that_cannot_be_dealt_out():
    with pytest.raises(ValueError, match="data-parallel ranks"):
        BatchCursor(WINDOWS, 6, 2, torch.device("cpu"), 0, 2)
