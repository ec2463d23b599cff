"""Weights out of training checkpoints: resharded, exported and inspected like any model folder."""

import pytest
import torch
from rich.console import Console

from halo_jobs.recipe import TrainingSection
from halo_jobs.release_sources import release_source
from halo_training.objectives import NextTokenObjective
from halo_training.optimizer import build_optimizer
from halo_training.trainer import Trainer
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel
from hypenet_megatron.presets import ModelShape
from hypenet_megatron.runtime import model_parallel
from hypenet_tools.convert import reshard_job
from hypenet_tools.folder_job import run_job
from hypenet_tools.inspection import inspect_model
from hypenet_tools.layout import FolderLayout
from hypenet_tools.model_weights import load_weights
from hypenet_tools.open_model import open_model
from sharded_tensors.reader import StoredTensors
from tests.support.windows import RandomWindows, cursor_of_this_rank

SHAPE = ModelShape("tiny", 4, 32, 48, 4, 2, 8, 64, tied_embeddings=False)
MIXERS = SHAPE.hybrid_mixers((1,), "lightning")


@pytest.fixture
def trained(tmp_path):
    """The checkpoints of a run, and the weights that resuming from the newest one gives."""
    section = TrainingSection(
        steps=4,
        context_length=16,
        global_batch=4,
        micro_batch=4,
        learning_rate=1e-2,
        warmup_steps=1,
        checkpoint_every=4,
    )
    run = tmp_path / "run"
    stage = run / "finetune.hybrid" / "0123456789ab"
    stage.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: run\n")
    with model_parallel(seed=1):
        config = DecoderConfig.from_shape(SHAPE, MIXERS, dtype=torch.bfloat16)
        cursor = cursor_of_this_rank(RandomWindows(16, 64), section)
        objective = NextTokenObjective(DecoderModel(config))
        trainer = Trainer("test", section, objective, cursor, stage, Console(quiet=True), None)
        trainer.run()
        restored = NextTokenObjective(DecoderModel(config))
        trainer.checkpoints.load(2, restored.model, build_optimizer(restored.chunks, section), None)
        weights = {name: parameter.detach().clone() for name, parameter in restored.model.named_parameters()}
    return stage / "checkpoints", weights


def test_slim_copy_of_a_checkpoint(trained, tmp_path):
    checkpoints, expected = trained
    newest = sorted(checkpoints.glob("step-*"))[-1]
    opened = open_model(newest)
    assert opened.model.mixer_types == MIXERS
    assert inspect_model(opened)["files_not_matching_their_checksum"] == []
    assert run_job(reshard_job(opened, tmp_path / "slim", FolderLayout(2, 2)))
    slim = StoredTensors(tmp_path / "slim")
    assert slim.keys() == expected.keys()
    assert all(slim[name].equal(expected[name]) for name in expected)
    assert [step["step"] for step in open_model(slim.folder).metadata.provenance] == ["training", "reshard"]
    stored = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    assert slim.nbytes * 6 < stored, "masters and moments stay behind"


def test_checkpoint_away_from_its_run_is_complete(trained, tmp_path):
    """It says itself which model it is of."""
    checkpoints, expected = trained
    newest = sorted(checkpoints.glob("step-*"))[-1]
    newest.rename(tmp_path / "elsewhere")
    opened = open_model(tmp_path / "elsewhere")
    assert (opened.kind, opened.model.mixer_types) == ("training checkpoint", MIXERS)
    assert opened.model.shape.num_layers == SHAPE.num_layers
    assert opened.stored.keys() == expected.keys()


def test_weights_of_a_checkpoint_load_like_a_weights_folder(trained):
    checkpoints, expected = trained
    newest = sorted(checkpoints.glob("step-*"))[-1]
    with model_parallel(seed=2):
        config = DecoderConfig.from_shape(SHAPE, MIXERS, dtype=torch.bfloat16)
        model = DecoderModel(config)
        load_weights(newest, model)
        assert all(parameter.equal(expected[name]) for name, parameter in model.named_parameters())


def test_run_that_has_not_come_to_its_export(trained):
    checkpoints, _ = trained
    with pytest.raises(ValueError, match="run has not exported its model yet; finish it with `halo run`"):
        release_source(checkpoints.parent.parent.parent)
