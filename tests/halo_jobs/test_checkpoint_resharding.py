"""Training checkpoints rewritten for another layout, optimizer and all: the same bits, and training goes on."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from halo_jobs.cli import app
from halo_training.checkpointing import TrainingCheckpoints
from hypenet_tools.convert import reshard_job
from hypenet_tools.folder_job import FolderJob, run_job
from hypenet_tools.layout import FolderLayout
from hypenet_tools.open_model import open_model
from tests.support.halo import halo
from tests.support.resume_grid import checkpoint_tensors
from tests.support.small_ranks import Ranks, ranks_to_kill

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="gloo ranks on the CPU backend; with CUDA it is off"
    ),
]
LAYOUTS = {"tp2": {"tensor": 2}, "distopt": {"distributed_optimizer": True}, "pp2": {"pipeline": 2}}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with ranks_to_kill() as started:
        yield started


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory) -> dict[str, Path]:
    """Training folders of runs by layout, finished."""
    root = tmp_path_factory.mktemp("runs")
    folders = {}
    for name, layout in LAYOUTS.items():
        run = root / name
        folders[name] = run / "finetune.hybrid" / "0"
        world = ranks.start(folders[name], layout=layout)
        assert world.wait() == [0, 0], world.errors()
    return folders


def _job(source: Path, out: Path, layout: FolderLayout) -> FolderJob:
    return reshard_job(open_model(source).with_optimizer(), out, layout)


def newest(folder: Path) -> Path:
    checkpoints = TrainingCheckpoints(folder / "checkpoints")
    return checkpoints.path(checkpoints.steps()[-1])


@pytest.mark.parametrize("layout", [FolderLayout(), FolderLayout(2, 2), FolderLayout(1, 2)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_tensors_in_other_files(trained, tmp_path, name, layout):
    source = newest(trained[name])
    assert run_job(_job(source, tmp_path / "out", layout))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    ranks = itertools.product(range(layout.tensor), range(layout.pipeline))
    assert files == [f"t{tensor}-p{stage}-e0-00001.safetensors" for tensor, stage in ranks]
    before, after = checkpoint_tensors(source), checkpoint_tensors(tmp_path / "out")
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in before)
    assert before.keys() == after.keys()
    assert [key for key in before if not before[key].equal(after[key])] == []


@pytest.mark.parametrize(("name", "layout"), [("pp2", "tp2"), ("distopt", "pp2"), ("tp2", "distopt")])
def test_training_goes_on_from_it_as_from_the_original(ranks, trained, tmp_path, name, layout):
    source = newest(trained[name])
    ends = []
    for kind in ("original", "resharded"):
        stage = tmp_path / kind
        target = stage / "checkpoints" / source.name
        if kind == "original":
            shutil.copytree(source, target)
        else:
            target.parent.mkdir(parents=True)
            options = LAYOUTS[layout]
            out = FolderLayout(options.get("tensor", 1), options.get("pipeline", 1))
            assert run_job(_job(source, target, out))
        world = ranks.start(stage, layout=LAYOUTS[layout])
        assert world.wait() == [0, 0], world.errors()
        lines = (stage / "metrics.jsonl").read_text().splitlines()
        ends.append(
            [(entry["step"], entry["loss"], entry["gradient_norm"]) for entry in map(json.loads, lines)]
        )
    assert ends[0] == ends[1]
    assert [step for step, _, _ in ends[0]] == [11, 12]
    finals = [sorted((tmp_path / kind / "final").glob("*.safetensors")) for kind in ("original", "resharded")]
    assert [path.read_bytes() for path in finals[0]] == [path.read_bytes() for path in finals[1]]


def test_a_damaged_checkpoint_is_not_given_new_checksums(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained["tp2"].parent.parent, run)
    source = newest(run / "finetune.hybrid" / "0")
    victim = source / "rank-00001.safetensors"
    content = bytearray(victim.read_bytes())
    content[-100] ^= 1
    victim.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"rank-00001\.safetensors does not match its checksum; reshard another"
    ):
        run_job(_job(source, tmp_path / "out", FolderLayout()))
    assert not (tmp_path / "out").exists()
    victim.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"rank-00001\.safetensors"):
        _job(source, tmp_path / "other", FolderLayout())


def test_the_command(trained, tmp_path):
    source = newest(trained["tp2"])
    done = halo("reshard", source, tmp_path / "out", "--pp", 2)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert len(list((tmp_path / "out").glob("t0-*"))) == 2
    with pytest.raises(
        ValueError, match=r"--dtype is for weights, and .* has an optimizer too; add --weights-only"
    ):
        app(["reshard", str(source), str(tmp_path / "other"), "--dtype", "bf16"], standalone_mode=False)
    with pytest.raises(ValueError, match="--tp 4 does not divide the 2 key/value heads"):
        app(["reshard", str(source), str(tmp_path / "other"), "--tp", "4"], standalone_mode=False)
