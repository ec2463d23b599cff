"""Files that survive: what a reader finds after a writer finished, failed, or was killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from durable_files import (
    TEMPORARY_MARK,
    FolderManifest,
    discard_leftovers,
    fsync_tree,
    publish_folder,
    publish_once,
    read_json,
    sha256_file,
    temporary_sibling,
    write_bytes,
    write_json,
    write_text,
)


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file.bin"]


def test_json_keeps_characters_and_key_order(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"title": "½ Größe", "a": [1, None]})
    assert read_json(path) == {"title": "½ Größe", "a": [1, None]}
    assert path.read_text() == '{\n  "title": "½ Größe",\n  "a": [\n    1,\n    null\n  ]\n}\n'


def test_failed_write_keeps_the_old_content_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("content", "mend"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "restore it or delete it and rerun"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_read_json_names_the_file_and_the_mend(tmp_path: Path, content: bytes, mend: str) -> None:
    path = tmp_path / "DONE.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=mend) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_read_json_waits_for_a_file_that_is_being_published_without_hard_links(tmp_path: Path) -> None:
    (tmp_path / "x.json").touch()
    publisher = threading.Timer(0.1, (tmp_path / "x.json").write_text, ['{"a": 1}'])
    publisher.start()
    assert read_json(tmp_path / "x.json") == {"a": 1}
    publisher.join()


def test_read_json_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json does not exist; check the folder"):
        read_json(tmp_path / "none.json")


def test_publish_once_keeps_the_first(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "DONE.json"
    assert publish_once(path, {"by": 1})
    assert not publish_once(path, {"by": 2})
    assert read_json(path) == {"by": 1}
    assert os.listdir(path.parent) == ["DONE.json"]


def test_publish_folder_replaces_whole_folders(tmp_path: Path) -> None:
    final = tmp_path / "store"
    for content in ("old", "new"):
        temporary = temporary_sibling(final)
        temporary.mkdir()
        (temporary / f"{content}.bin").write_text(content)
        publish_folder(temporary, final)
    assert os.listdir(tmp_path) == ["store"]
    assert os.listdir(final) == ["new.bin"]


KILLED_WRITER = """
    import os, signal, sys
    from pathlib import Path
    import durable_files.publish as publish

    # Killed at the last moment: content is written and flushed, the rename has not happened.
    publish.os.replace = publish.os.rename = publish.os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    path = Path(sys.argv[1])
    if sys.argv[2] == "folder":
        temporary = publish.temporary_sibling(path)
        temporary.mkdir()
        (temporary / "x").write_text("new")
        publish.publish_folder(temporary, path)
    elif sys.argv[2] == "once":
        publish.publish_once(path, {"by": "killed"})
    else:
        publish.write_text(path, "new")
"""


@pytest.mark.parametrize("kind", ["text", "once", "folder"])
def test_killed_writer_leaves_only_a_temporary_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "target"
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_WRITER), str(path), kind], check=False
    )
    assert child.returncode == -signal.SIGKILL
    assert not path.exists()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(f"target{TEMPORARY_MARK}")
    assert discard_leftovers(tmp_path) == [leftover]
    assert os.listdir(tmp_path) == []


def test_discard_leftovers_touches_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / f"inner{TEMPORARY_MARK}00000000").write_text("not directly in it")
    (tmp_path / "unfinished-business.txt").write_text("a user's file")
    assert discard_leftovers(tmp_path) == []
    assert discard_leftovers(tmp_path / "missing") == []


def test_fsync_tree_reaches_every_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_text("x")
    (tmp_path / "y").write_text("y")
    flushed = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    fsync_tree(tmp_path)
    assert flushed == {path.stat().st_ino for path in [tmp_path, *tmp_path.rglob("*")]}


def test_manifest_finds_what_changed(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("shards/0", "shards/1", "shards/2", "meta.json"):
        (tmp_path / name).write_text(f"content of {name}")
    written = FolderManifest.write(tmp_path)
    read = FolderManifest.read(tmp_path)
    assert read == written
    assert set(read.files) == {"shards/0", "shards/1", "shards/2", "meta.json"}
    assert read.files["meta.json"] == (len("content of meta.json"), sha256_file(tmp_path / "meta.json"))
    assert list(read.problems(tmp_path)) == []
    (tmp_path / "shards/0").unlink()
    (tmp_path / "shards/1").write_text("short")
    (tmp_path / "shards/2").write_text("CONTENT of shards/2")
    problems = list(read.problems(tmp_path))
    assert problems == [
        f"{tmp_path / 'shards/0'} is missing",
        f"{tmp_path / 'shards/1'} has 5 bytes instead of {len('content of shards/1')}",
        f"{tmp_path / 'shards/2'} does not match its checksum",
    ]


def test_sha256_of_a_known_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc").startswith("ba7816bf8f01cfea")


def test_replacement_cut_short_keeps_the_old_folder(tmp_path, monkeypatch):
    """A kill between the two renames: the next writer finds the old folder under its name again."""
    final, temporary = tmp_path / "thing", tmp_path / "thing.unfinished-1"
    for folder, content in ((final, "old"), (temporary, "new")):
        folder.mkdir()
        (folder / "file").write_text(content)
    rename = os.rename
    renames = []

    def rename_once(source, target):
        if renames:
            raise KeyboardInterrupt
        renames.append(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_once)
    with pytest.raises(KeyboardInterrupt):
        publish_folder(temporary, final)
    monkeypatch.undo()
    assert not final.exists()
    discard_leftovers(tmp_path)
    assert (final / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
