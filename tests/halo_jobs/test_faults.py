"""Ranks that are killed, stopped or asked to stop, in the middle of training and of saves.

`make test` kills three times, `make test-faults` twenty. HALO_TEST_SEED chooses the moments.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from durable_files import FolderManifest, read_json
from halo_jobs.terminal import STOPPED_EXIT_CODE
from halo_training.checkpointing import TrainingCheckpoints
from halo_training.supervision.stop import STOP_FILE
from hypenet_megatron.runtime import model_parallel
from hypenet_tools.model_weights import read_weights
from tests.support.small_ranks import EVERY, SAVED, STEPS, Ranks, World, ranks_to_kill

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="gloo ranks on the CPU backend; with CUDA it is off"
    ),
]
LAYOUTS = [{}, {"tensor": 2}, {"distributed_optimizer": True}, {"pipeline": 2}]
GOES_ON = "the same command resumes from the last checkpoint"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with ranks_to_kill() as started:
        yield started


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory) -> dict[str, Path]:
    """Folders of uninterrupted trainings by layout."""
    root = tmp_path_factory.mktemp("whole")
    folders = {}
    for number, layout in enumerate(LAYOUTS):
        folders[str(layout)] = root / str(number)
        world = ranks.start(root / str(number), layout=layout)
        assert world.wait() == [0, 0], world.errors()
    return folders


def _final_weights(folder: Path) -> dict[str, Tensor]:
    with model_parallel(seed=1):
        return read_weights(folder / "final")


def _assert_same_weights(folder: Path, whole: Path) -> None:
    found, expected = _final_weights(folder), _final_weights(whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not expected[name].equal(found[name])] == []


def _last_step(folder: Path) -> int:
    """Steps that the training had surely finished."""
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def _saved_step(folder: Path) -> int:
    with model_parallel(seed=1):
        step, damage = TrainingCheckpoints(folder / "checkpoints").newest_valid()
    assert damage == [], "a kill left a checkpoint that cannot be loaded"
    return step or 0


def _until(condition, world: World, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if len(world.alive()) < world.job.ranks:
            return
        assert time.monotonic() < end
        time.sleep(0.002)


def _unfinished(folder: Path) -> set[Path]:
    return set((folder / "checkpoints").glob("*.unfinished-*"))


def _inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def _kill_once(rng: random.Random, ranks: Ranks, folder: Path, layout: dict, moments: list[str]) -> bool:
    """Start or resume, kill one rank, wait for the other to notice; False if the training was done before."""
    before, leftovers, metrics = _saved_step(folder), _unfinished(folder), folder / "metrics.jsonl"
    log = _inode(metrics)
    world = ranks.start(folder, layout=layout, step_seconds=0.05, write_seconds=0.12)
    moment, steps = rng.choice(["save", "save", "step", "step", "start"]), rng.randrange(1, 5)
    if moment == "save":
        _until(lambda: _unfinished(folder) - leftovers, world)
    elif moment == "step":
        _until(lambda: _inode(metrics) != log and _last_step(folder) >= before + steps, world)
    time.sleep(rng.uniform(0.0, {"save": 0.15, "step": 0.05, "start": 1.0}[moment]))
    victim = rng.randrange(2)
    has_begun = _inode(metrics) != log
    world.send(victim, signal.SIGKILL)
    if not has_begun:
        # Before the ranks have met, one cannot know that another will never come; `run_ranks` then ends all of them.
        time.sleep(1.0)
        world.send(1 - victim, signal.SIGKILL)
    codes = world.wait(seconds=60)
    if codes[victim] != -signal.SIGKILL:
        assert codes == [0, 0], world.errors()
        return False
    if has_begun and codes[1 - victim] != 0:  # 0: it had nothing left to ask the other for
        assert codes[1 - victim] == 1
        assert GOES_ON in world.errors()[1 - victim], world.errors()
    was_in_a_save = bool(_unfinished(folder) - leftovers)
    assert _saved_step(folder) >= before
    assert _last_step(folder) - _saved_step(folder) <= EVERY
    moments.append("save" if was_in_a_save else "step" if has_begun else "start")
    return True


def _kill_repeatedly(
    ranks: Ranks, folder: Path, whole: dict[str, Path], kills: int, seed: str
) -> Counter[str]:
    """Returns how many kills hit a save, a step without one, and the time before the first step."""
    rng = random.Random(seed)
    moments: list[str] = []
    done, training = 0, 0
    while done < kills:
        layout = LAYOUTS[training % len(LAYOUTS)]
        here = folder / str(training)
        here.mkdir()
        killed = 0
        while done < kills and killed < 3 and _kill_once(rng, ranks, here, layout, moments):
            done, killed = done + 1, killed + 1
        last = ranks.start(here, layout=layout)
        assert last.wait() == [0, 0], last.errors()
        _assert_same_weights(here, whole[str(layout)])
        training += 1
    return Counter(moments)


def test_kill_9_of_any_rank_at_any_moment(ranks, whole, tmp_path):
    _kill_repeatedly(ranks, tmp_path, whole, 3, os.environ.get("HALO_TEST_SEED", "4"))


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_twenty_kills(ranks, whole, tmp_path):
    seed = os.environ.get("HALO_TEST_SEED", str(time.time_ns()))
    moments = _kill_repeatedly(ranks, tmp_path, whole, 20, seed)
    print(f"HALO_TEST_SEED={seed}: {dict(moments)}")
    assert moments["save"] >= 3 and moments["step"] >= 3


def test_kill_while_a_checkpoint_is_written(ranks, whole, tmp_path):
    """Neither rank's part alone is a checkpoint, however long the other one had."""
    world = ranks.start(tmp_path, write_seconds=1.5, step_seconds=0.02)
    _until(lambda: _unfinished(tmp_path), world)
    time.sleep(0.2)
    world.send(1, signal.SIGKILL)
    assert world.wait() == [1, -signal.SIGKILL]
    assert _saved_step(tmp_path) == 0
    assert _unfinished(tmp_path)
    again = ranks.start(tmp_path)
    assert again.wait() == [0, 0], again.errors()
    assert not _unfinished(tmp_path), "what the killed save left is gone"
    _assert_same_weights(tmp_path, whole["{}"])


def test_steps_wait_for_a_save_that_takes_too_long(ranks, whole, tmp_path):
    """Training goes on beside a save, but no further than a kill may cost."""
    world = ranks.start(tmp_path, write_seconds=120)
    _until(lambda: _last_step(tmp_path) >= EVERY, world)
    time.sleep(1.0)  # many steps would fit
    assert _last_step(tmp_path) == EVERY and _saved_step(tmp_path) == 0
    world.send(1, signal.SIGKILL)
    assert world.wait() == [1, -signal.SIGKILL]
    assert GOES_ON in world.errors()[0]
    again = ranks.start(tmp_path)
    assert again.wait() == [0, 0], again.errors()
    _assert_same_weights(tmp_path, whole["{}"])


def test_at_no_moment_is_more_at_stake_than_the_recipe_says(ranks, whole, tmp_path):
    world = ranks.start(tmp_path, step_seconds=0.02, write_seconds=0.2)
    checkpoints = TrainingCheckpoints(tmp_path / "checkpoints")
    at_stake = [0]
    while world.alive():
        done = _last_step(
            tmp_path
        )  # first: what is published meanwhile makes the difference smaller, not larger
        at_stake.append(done - max(checkpoints.steps(), default=0))
        time.sleep(0.002)
    assert world.wait() == [0, 0], world.errors()
    assert SAVED < max(at_stake) <= EVERY, "steps are done beside a save, and wait for it in time"
    _assert_same_weights(tmp_path, whole["{}"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_stop_by_a_signal_to_one_rank(ranks, whole, tmp_path, number):
    world = ranks.start(tmp_path, step_seconds=0.05, write_seconds=0.2)
    _until(lambda: _last_step(tmp_path) >= 4, world)
    world.send(1, number)
    asked_after = _last_step(tmp_path)
    assert world.wait() == [STOPPED_EXIT_CODE] * 2, world.errors()
    stopped = _saved_step(tmp_path)
    assert stopped == _last_step(tmp_path)
    # The step under way is not in the log yet; the signal may have come when its end was already agreed on.
    assert stopped <= asked_after + 2
    assert f"stopped by {number.name} after step {stopped} of {STEPS}" in world.errors()[0]
    again = ranks.start(tmp_path)
    assert again.wait() == [0, 0], again.errors()
    _assert_same_weights(tmp_path, whole["{}"])


def test_stop_by_a_file(ranks, whole, tmp_path):
    world = ranks.start(tmp_path, step_seconds=0.05)
    _until(lambda: _last_step(tmp_path) >= 1, world)
    (tmp_path / STOP_FILE).touch()
    assert world.wait() == [STOPPED_EXIT_CODE] * 2, world.errors()
    assert f"stopped by the file {tmp_path / STOP_FILE}" in world.errors()[1]
    assert not (tmp_path / STOP_FILE).exists()
    assert _saved_step(tmp_path) == _last_step(tmp_path)
    again = ranks.start(tmp_path)
    assert again.wait() == [0, 0], again.errors()
    _assert_same_weights(tmp_path, whole["{}"])


def test_watchdog_names_a_rank_that_does_not_answer(ranks, tmp_path):
    world = ranks.start(tmp_path, step_seconds=0.05, watchdog_seconds=5.0)
    _until(lambda: _last_step(tmp_path) >= 2, world)
    world.send(1, signal.SIGSTOP)
    while 0 in world.alive():
        time.sleep(0.05)
    message = world.errors()[0]
    assert "no progress for 5 s" in message and "on rank 0" in message
    assert f"rank 1 (process {world.pids[1]} on" in message and "does not answer" in message
    # Which collective the step had reached when rank 1 stopped, chance decides.
    assert re.search(r"distributed_c10d\.py\W+ line \d+ in \w+", (tmp_path / "stacks.rank-0.txt").read_text())
    world.send(1, signal.SIGKILL)
    assert world.wait() == [1, -signal.SIGKILL]


def test_watchdog_dumps_the_stacks_of_all_ranks(ranks, tmp_path):
    world = ranks.start(tmp_path, stall_at=4, watchdog_seconds=4.0)
    assert world.wait() == [1, 1]
    spoken = [message for message in world.errors() if message]
    assert len(spoken) == 1, "one sentence, not one per rank"
    assert "no progress for 4 s after step 4" in spoken[0] and str(tmp_path) in spoken[0]
    stalled, waiting = ((tmp_path / f"stacks.rank-{rank}.txt").read_text() for rank in range(2))
    assert "small_rank_main.py" in stalled and "in window" in stalled
    assert "all_reduce" in waiting


def test_rank_that_cannot_write(ranks, whole, tmp_path):
    """The error of a background write ends all ranks in its own words, and the checkpoint before it stands."""
    world = ranks.start(tmp_path, step_seconds=0.05, unwritable_step=2 * SAVED)
    assert world.wait() == [1, 1]
    for message in world.errors():
        assert "No space left on device" in message and "rank-00001.safetensors" in message
    assert _saved_step(tmp_path) == SAVED
    assert not _unfinished(tmp_path)
    again = ranks.start(tmp_path)
    assert again.wait() == [0, 0], again.errors()
    _assert_same_weights(tmp_path, whole["{}"])


def _damages(path: Path) -> Iterator[str]:
    """Each yields with `path` damaged in one way, and mends it."""
    content = path.read_bytes()
    rng = random.Random(path.name)

    def flipped() -> bytes:
        place = rng.randrange(len(content))
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]

    for name, damaged in (
        ("truncated", content[: rng.randrange(len(content))]),
        ("emptied", b""),
        ("deleted", None),
        *((f"flipped {number}", flipped()) for number in range(20)),
    ):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        yield name
        path.write_bytes(content)


def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(ranks, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole["{}"], folder)
    checkpoints = TrainingCheckpoints(folder / "checkpoints")
    before, newest = checkpoints.steps()[-2:]
    files = sorted(checkpoints.path(newest).iterdir())
    assert len(files) == 5, "manifest, index, training, two ranks"
    with model_parallel(seed=1):
        assert checkpoints.newest_valid() == (newest, [])
        for path in files:
            for name in _damages(path):
                step, damage = checkpoints.newest_valid()
                assert step == before, (path.name, name)
                assert len(damage) == 1
                # A manifest that can still be read accuses the file that it is wrong about.
                assert str(checkpoints.path(newest)) in damage[0]
                assert str(path) in damage[0] or path.name == FolderManifest.FILE_NAME, (name, damage)
        assert checkpoints.newest_valid() == (newest, []), "mended"
    (damaged := files[-1]).write_bytes(files[-1].read_bytes()[:-1])
    shutil.rmtree(folder / "final")
    world = ranks.start(folder)
    assert world.wait() == [0, 0], world.errors()
    _assert_same_weights(folder, whole["{}"])
    aside = checkpoints.path(newest).with_name(f"{checkpoints.path(newest).name}.damaged")
    assert (aside / damaged.name).exists()
    assert read_json(checkpoints.path(newest) / "TRAINING.json")["step"] == newest
