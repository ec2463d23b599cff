"""runs/<name>: the latest plan, the lock, the status table, disks that refuse."""

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


def test_the_latest_recipe_and_plan_are_the_runs(run: RunFolder, recipe: str) -> None:
    with run.opened():
        assert run.planned() == []
        for text, hashes in ((recipe, {"init": "0" * 12}), ("name: other\n", {"init": "1" * 12, "align": "2" * 12})):
            run.write_plan(text, hashes)
            assert (run.folder / "recipe.yaml").read_text() == text
            assert [(record.stage, record.input_hash) for record in run.planned()] == list(hashes.items())


def test_drivers_that_start_at_once_do_not_refuse_each_other(run: RunFolder) -> None:
    with ThreadPoolExecutor(8) as together:
        for prepared in [together.submit(run.prepare) for _ in range(64)]:
            prepared.result()


def test_a_run_that_is_held_is_not_prepared(run: RunFolder) -> None:
    with run.opened(), pytest.raises(ValueError, match="is in use by process"):
        run.prepare()
    run.prepare()


HOLDER = """
    import sys, time
    from pathlib import Path
    from halo_cluster import RunFolder
    with RunFolder(Path(sys.argv[1])).opened():
        print("held", flush=True)
        time.sleep(600)
"""


def test_live_holder_is_respected_and_a_killed_one_is_not(run: RunFolder) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(run.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=f"in use by process {child.pid}; wait for it"),
            run.opened(),
        ):
            pytest.fail("opened a run that is in use")
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie with that pid
        with run.opened():
            assert sorted(path.name for path in run.folder.glob("lock.*")) == ["lock.2"]


def test_a_later_process_with_the_same_pid_is_not_the_holder(run: RunFolder) -> None:
    with run.opened():
        held = read_json(run.folder / "lock.1")
    write_json(run.folder / "lock.1", {**held, "birth": "another boot:1", "released": False})
    with run.opened():
        assert read_json(run.folder / "lock.2")["pid"] == os.getpid()


def test_holder_on_another_host_is_named_with_the_lock_file(run: RunFolder) -> None:
    with run.opened():
        held = read_json(run.folder / "lock.1")
    other = f"not-{socket.gethostname()}"
    write_json(run.folder / "lock.1", {**held, "host": other, "released": False})
    with (
        pytest.raises(ValueError, match=rf"on {other}; wait for it, or remove .*lock\.1 if it has ended"),
        run.opened(),
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
            with run.opened():
                (run.folder / "alone").mkdir()  # fails if anybody else is in here
                (run.folder / "alone").rmdir()
                taken += 1
        except ValueError as refusal:
            assert "is in use by process" in str(refusal), refusal
"""


def test_never_two_holders_at_once(run: RunFolder) -> None:
    command = [sys.executable, "-c", textwrap.dedent(TURN_TAKER), str(run.folder)]
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
    align.begin_attempt().end("failed", "loss is NaN at step 7")
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


def test_file_in_place_of_the_runs_folder_is_one_sentence(run: RunFolder) -> None:
    run.folder.parent.write_text("not a folder")
    with pytest.raises(StorageError) as refusal, run.opened():
        pytest.fail("opened a run below a file")
    sentence = str(refusal.value)
    assert sentence.startswith(f"{run.folder} cannot be written: ")
    assert "move the file that is in the place of a folder" in sentence
    assert "\n" not in sentence


def test_full_disk_is_one_sentence(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: without a file system of its own a test cannot fill a disk."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(StorageError, match="No space left on device; free some space there"),
        run.opened(),
    ):
        pytest.fail("opened a run on a full disk")
    monkeypatch.undo()
    with run.opened():
        assert list(run.folder.glob("lock.*"))
    assert list(run.folder.glob("*.unfinished-*")) == []


def test_read_only_disk_is_one_sentence(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: root, as whom the tests may run, passes over permission bits."""

    def read_only(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with (
        pytest.raises(
            StorageError, match=r"Read-only file system \(.*\); remount it writable or choose another"
        ),
        run.opened(),
    ):
        pytest.fail("opened a run on a read-only disk")
