"""Sources are identified by the content of the files that stages read, and read once."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from halo_jobs import sources
from halo_jobs.sources import SOURCES_FILE, Source, SourceChecksums

QUIET = Console(file=io.StringIO())
MEGABYTE = 1 << 20


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Source:
    folder = tmp_path / "corpus"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_text("the first")
    (folder / "deeper" / "b.jsonl").write_text('{"text": "the second"}\n')
    return Source("corpus.train", folder, "text")


@pytest.fixture
def teacher(tmp_path: Path) -> Source:
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return Source("teacher", folder, "weights")


def read(run: Path, *sources: Source) -> list[str]:
    """Digests after a run has read what it had to."""
    checksums = SourceChecksums(run)
    checksums.read(sources, QUIET)
    digests = [checksums.digest(source) for source in sources]
    assert None not in digests
    return [str(digest) for digest in digests]


@pytest.fixture
def opened() -> list[str]:
    """Paths of files that are opened from here on."""
    paths: list[str] = []
    active = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if active and event == "open" and isinstance(arguments[0], str | os.PathLike):
            paths.append(os.fspath(arguments[0]))

    sys.addaudithook(hook)  # for the rest of the process, and idle after the test
    yield paths
    active = False


def test_nothing_is_known_before_it_was_read(run, corpus) -> None:
    assert SourceChecksums(run).digest(corpus) is None
    read(run, corpus)
    assert SourceChecksums(run).digest(corpus) is not None


def test_a_later_look_opens_no_source(run, corpus, opened) -> None:
    (digest,) = read(run, corpus)
    assert any(str(corpus.path) in path for path in opened), "the hook sees reads"
    opened.clear()
    assert read(run, corpus) == [digest]
    assert SourceChecksums(run).digest(corpus) == digest
    assert not any(str(corpus.path) in path for path in opened)


def test_another_run_of_the_folder_reads_nothing_again(run, corpus, opened) -> None:
    digests = read(run, corpus)
    other = run.parent / "two"
    other.mkdir()
    opened.clear()
    assert SourceChecksums(other).digest(corpus) == digests[0]
    assert read(other, corpus) == digests
    assert not any(str(corpus.path) in path for path in opened)
    shutil.rmtree(run)
    assert SourceChecksums(other).digest(corpus) == digests[0], "it remembers by itself"


def test_only_a_changed_file_is_read_again(run, corpus, opened) -> None:
    before = read(run, corpus)
    (corpus.path / "a.txt").write_text("another first")
    assert SourceChecksums(run).digest(corpus) is None
    opened.clear()
    assert read(run, corpus) != before
    assert {Path(path).name for path in opened if str(corpus.path) in path} == {"a.txt"}


def test_touched_and_moved_files_of_the_same_content_are_the_same_source(run, corpus, tmp_path) -> None:
    before = read(run, corpus)
    os.utime(corpus.path / "a.txt", ns=(1, 1))
    assert read(run, corpus) == before
    moved = Source("corpus.train", tmp_path / "elsewhere", "text")
    corpus.path.rename(moved.path)
    assert read(run, moved) == before


def test_files_that_no_stage_reads_change_nothing(run, corpus, teacher) -> None:
    before = read(run, corpus, teacher)
    for source in (corpus, teacher):
        (source.path / "README.md").write_text("a note")
        (source.path / ".git").mkdir()
        (source.path / ".git" / "HEAD").write_text("ref")
        (source.path / ".cache").mkdir()
        (source.path / ".cache" / "download.metadata").write_text("etag")
    checksums = SourceChecksums(run)
    assert [checksums.digest(source) for source in (corpus, teacher)] == before


@pytest.mark.parametrize("name", ["generation_config.json", "LICENSE", "README.md"])
def test_a_file_that_only_the_export_copies_changes_only_the_exports_source(run, teacher, name) -> None:
    files = Source("tokenizer", teacher.path, "export files")
    (teacher.path / name).write_text("before")
    weights, export = read(run, teacher, files)
    (teacher.path / name).write_text("afterwards")
    assert read(run, teacher) == [weights]
    assert read(run, files) != [export]


def test_a_file_that_cannot_be_read_is_named_not_the_run_folder(run, corpus, monkeypatch) -> None:
    def fail(*_: object) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sources, "_sha256", fail)
    with pytest.raises(ValueError, match=r"corpus/\S+ cannot be read \(Input/output error\)"):
        SourceChecksums(run).read([corpus], QUIET)


def test_another_runs_damaged_memory_is_ignored(run, corpus) -> None:
    before = read(run, corpus)
    other = run.parent / "other"
    other.mkdir()
    (other / SOURCES_FILE).write_text("{")
    assert read(run, corpus) == before


@pytest.mark.parametrize("megabytes", [1, 65])
def test_retrained_teacher_of_the_same_size_and_names_is_noticed(run, teacher, megabytes) -> None:
    weights = teacher.path / "model.safetensors"
    weights.write_bytes(bytes(megabytes * MEGABYTE))
    before = read(run, teacher)
    with open(weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"1")
    assert SourceChecksums(run).digest(teacher) is None
    assert read(run, teacher) != before


def test_a_removed_source_counts_as_it_was(run, corpus) -> None:
    before = read(run, corpus)
    shutil.rmtree(corpus.path)
    assert SourceChecksums(run).digest(corpus) == before[0]
    assert read(run, corpus) == before


def test_a_source_that_never_was_is_refused_with_its_key(run, corpus) -> None:
    absent = Source("corpus.held_out", corpus.path / "absent", "text")
    with pytest.raises(ValueError, match=r"corpus\.held_out: .*absent has no text; correct the path"):
        SourceChecksums(run).read([corpus, absent], QUIET)


def test_names_count_as_well_as_contents(run, corpus) -> None:
    before = read(run, corpus)
    (corpus.path / "a.txt").rename(corpus.path / "c.txt")
    assert read(run, corpus) != before
