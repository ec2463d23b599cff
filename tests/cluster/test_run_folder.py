"""runs/<name>: the frozen recipe, the lock, the status table, disks that refuse."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from durable_files import read_json, write_json
from halo_cluster import RunFolder, StorageError


def test_recipe_is_frozen_at_first_use_and_the_same_one_opens_again(run: RunFolder, recipe: str) -> None:
    with run.opened(recipe):
        assert (run.folder / "recipe.yaml").read_text() == recipe
    with run.opened("# a comment changes nothing\n" + recipe):
        assert (run.folder / "recipe.yaml").read_text() == recipe


def test_drivers_that_start_at_once_do_not_refuse_each_other(run: RunFolder, recipe: str) -> None:
    with ThreadPoolExecutor(8) as together:
        for prepared in [together.submit(run.prepare, recipe) for _ in range(64)]:
            prepared.result()
    assert (run.folder / "recipe.yaml").read_text() == recipe


def test_of_two_recipes_at_once_the_first_is_frozen(run: RunFolder, recipe: str) -> None:
    recipes = [recipe, recipe.replace("steps: 100", "steps: 200")] * 4
    with ThreadPoolExecutor(8) as together:
        refused = [together.submit(run.prepare, each).exception() is not None for each in recipes]
    frozen = (run.folder / "recipe.yaml").read_text()
    assert refused == [each != frozen for each in recipes]


def test_a_run_that_is_held_is_not_prepared(run: RunFolder, recipe: str) -> None:
    with run.opened(recipe), pytest.raises(ValueError, match="is in use by process"):
        run.prepare(recipe)
    run.prepare(recipe)


def test_changed_recipe_is_refused_with_the_keys_and_the_mend(run: RunFolder, recipe: str) -> None:
    with run.opened(recipe):
        pass
    changed = recipe.replace("steps: 100", "steps: 200") + "  warmup_steps: 5\n"
    with pytest.raises(ValueError) as refusal, run.opened(changed):
        pytest.fail("opened a run of another recipe")
    assert str(refusal.value) == (
        f"{run.folder} holds a run of another recipe: align.steps is 100 there and 200 now, "
        f"align.warmup_steps is absent there and 5 now; choose another --run name, or remove {run.folder}"
    )
    with run.opened(recipe):  # the refusal released the lock
        assert (run.folder / "recipe.yaml").read_text() == recipe


def test_many_differences_are_counted(run: RunFolder, recipe: str) -> None:
    with run.opened(recipe):
        pass
    with (
        pytest.raises(ValueError, match="now and 1 more; choose another --run name"),
        run.opened("other: 1\n"),
    ):
        pytest.fail("opened a run of another recipe")


def test_damaged_recipe_file_is_named(run: RunFolder, recipe: str) -> None:
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text("align: [1,")
    with pytest.raises(ValueError, match=r"recipe\.yaml is damaged"), run.opened(recipe):
        pytest.fail("opened a damaged run")


HOLDER = """
    import sys, time
    from pathlib import Path
    from halo_cluster import RunFolder
    with RunFolder(Path(sys.argv[1])).opened(sys.argv[2]):
        print("held", flush=True)
        time.sleep(600)
"""


def test_live_holder_is_respected_and_a_killed_one_is_not(run: RunFolder, recipe: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(run.folder), recipe]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=f"in use by process {child.pid}; wait for it"),
            run.opened(recipe),
        ):
            pytest.fail("opened a run that is in use")
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie with that pid
        with run.opened(recipe):
            assert sorted(path.name for path in run.folder.glob("lock.*")) == ["lock.2"]


def test_a_later_process_with_the_same_pid_is_not_the_holder(run: RunFolder, recipe: str) -> None:
    with run.opened(recipe):
        held = read_json(run.folder / "lock.1")
    write_json(run.folder / "lock.1", {**held, "birth": "another boot:1", "released": False})
    with run.opened(recipe):
        assert read_json(run.folder / "lock.2")["pid"] == os.getpid()


def test_holder_on_another_host_is_named_with_the_lock_file(run: RunFolder, recipe: str) -> None:
    with run.opened(recipe):
        held = read_json(run.folder / "lock.1")
    other = f"not-{socket.gethostname()}"
    write_json(run.folder / "lock.1", {**held, "host": other, "released": False})
    with (
        pytest.raises(ValueError, match=rf"on {other}; wait for it, or remove .*lock\.1 if it has ended"),
        run.opened(recipe),
    ):
        pytest.fail("opened a run that another host may use")


TURN_TAKER = """
    import sys
    from pathlib import Path
    from halo_cluster import RunFolder
    run, taken = RunFolder(Path(sys.argv[1])), 0
    print("ready", flush=True)
    sys.stdin.readline()
    while taken < 20:
        try:
            with run.opened(sys.argv[2]):
                (run.folder / "alone").mkdir()  # fails if anybody else is in here
                (run.folder / "alone").rmdir()
                taken += 1
        except ValueError as refusal:
            assert "is in use by process" in str(refusal), refusal
"""


def test_never_two_holders_at_once(run: RunFolder, recipe: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(TURN_TAKER), str(run.folder), recipe]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    rivals = [subprocess.Popen(command, text=True, **pipes) for _ in range(4)]
    for rival in rivals:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("go\n")
        rival.stdin.flush()
    for rival in rivals:
        rival.communicate()
    assert [rival.returncode for rival in rivals] == [0] * 4


def test_status_lists_stages_in_the_order_they_began(run: RunFolder) -> None:
    init, align = run.stage("init", "0" * 12), run.stage("align", "1" * 12)
    first = init.begin_attempt()
    output = init.folder / "model.bin"
    output.write_text("x")
    first.publish([output], {})
    write_json(
        first.folder / "started.json", {**read_json(first.folder / "started.json"), "started": "2026-01-01"}
    )
    align.begin_attempt().fail("loss is NaN at step 7")
    (run.folder / "notes" / "of-the-user").mkdir(parents=True)
    rows = run.status()
    assert [(row.record.stage, row.state, row.reason) for row in rows] == [
        ("init", "done", ""),
        ("align", "failed", "loss is NaN at step 7"),
    ]
    assert rows[1].seconds == rows[1].attempts[0].seconds


def test_status_of_a_run_that_is_not_there_is_empty(run: RunFolder) -> None:
    assert run.status() == []
    assert not run.folder.exists()


def test_file_in_place_of_the_runs_folder_is_one_sentence(run: RunFolder, recipe: str) -> None:
    run.folder.parent.write_text("not a folder")
    with pytest.raises(StorageError) as refusal, run.opened(recipe):
        pytest.fail("opened a run below a file")
    sentence = str(refusal.value)
    assert sentence.startswith(f"{run.folder} cannot be written: ")
    assert "move the file away that stands where a folder should be" in sentence
    assert "\n" not in sentence


def test_full_disk_is_one_sentence(run: RunFolder, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: without a file system of its own a test cannot fill a disk."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(StorageError, match="No space left on device; free some space there"),
        run.opened(recipe),
    ):
        pytest.fail("opened a run on a full disk")
    monkeypatch.undo()
    with run.opened(recipe):
        assert (run.folder / "recipe.yaml").read_text() == recipe
    assert list(run.folder.glob("*.unfinished-*")) == []


def test_read_only_disk_is_one_sentence(run: RunFolder, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: root, as whom the tests may run, passes over permission bits."""

    def read_only(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with (
        pytest.raises(
            StorageError, match=r"Read-only file system \(.*\); remount it writable or choose another"
        ),
        run.opened(recipe),
    ):
        pytest.fail("opened a run on a read-only disk")
