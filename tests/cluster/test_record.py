"""The state of record of one stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import halo_cluster.record
from durable_files import read_json, sha256_file
from halo_cluster import Attempt, StageRecord, StorageError, input_hash


def begin(record: StageRecord, content: str = "weights") -> tuple[Attempt, Path]:
    attempt = record.begin_attempt()
    output = record.folder / "weights" / "model.bin"
    output.parent.mkdir(exist_ok=True)
    output.write_text(content)
    return attempt, output


def checksums(record: StageRecord, published: dict[str, Any]) -> dict[str, str]:
    return {name: sha256_file(record.folder / name) for name in published["outputs"]}


def test_input_hash_follows_content_and_not_the_order_of_keys() -> None:
    one = input_hash({"steps": 3, "inputs": {"init": "abc", "align": "def"}})
    assert one == input_hash({"inputs": {"align": "def", "init": "abc"}, "steps": 3})
    assert one != input_hash({"steps": 4, "inputs": {"init": "abc", "align": "def"}})
    assert len(one) == 12
    assert int(one, 16) >= 0


def test_input_hash_refuses_what_json_has_no_value_for() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        input_hash({"loss": float("nan")})


def test_published_stage_reads_back_with_checksums_of_files_and_folders(record: StageRecord) -> None:
    assert record.done() is None
    attempt, output = begin(record)
    metrics = record.folder / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n')
    published = attempt.publish([output.parent, metrics], {"loss": 0.5})
    assert record.done() == published
    assert published["stage"] == "distill.uniform"
    assert published["input_hash"] == record.input_hash
    assert published["attempt"] == "1"
    assert set(published["outputs"]) == {"weights/model.bin", "metrics.jsonl"}
    assert published["bytes"]["weights/model.bin"] == len("weights")
    assert published["summary"] == {"loss": 0.5}
    assert published["outputs"] == checksums(record, published)
    (status,) = record.attempts()
    assert (status.state, status.pid, status.reason) == ("done", os.getpid(), "")


def test_seconds_are_summed_over_attempts(record: StageRecord) -> None:
    first = record.begin_attempt()
    first.end("failed", "NaN loss")
    exit_file = first.folder / "exit.json"
    exit_file.write_text(json.dumps({**read_json(exit_file), "seconds": 1000.0}))
    second = record.begin_attempt()
    second.end("interrupted", "Ctrl-C")
    third, output = begin(record)
    published = third.publish([output], {})
    assert published["attempt"] == "3"
    assert published["seconds"] >= 1000.0
    assert published["started"] == first.started
    assert [status.state for status in record.attempts()] == ["failed", "interrupted", "done"]
    assert record.attempts()[0].reason == "NaN loss"


RACER = """
    import sys
    from pathlib import Path
    from halo_cluster import Attempt, StageRecord
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    attempt = Attempt(StageRecord(folder), folder / f"attempt.{number}")
    output = folder / f"output.{number}"
    output.write_text(f"made by {number}")
    print("ready", flush=True)
    sys.stdin.readline()
    print(attempt.publish([output], {"by": number})["summary"]["by"])
"""


def test_eight_processes_publish_once(record: StageRecord) -> None:
    racers = []
    for number in range(1, 9):
        (record.folder / f"attempt.{number}").mkdir(parents=True)
        command = [sys.executable, "-c", textwrap.dedent(RACER), str(record.folder), str(number)]
        racers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    saw = {int(racer.communicate()[0]) for racer in racers}
    assert [racer.returncode for racer in racers] == [0] * 8
    published = record.done()
    assert published is not None
    winner = int(published["attempt"])
    assert published["summary"] == {"by": winner}
    assert saw == {winner}
    assert published["outputs"] == checksums(record, published)
    assert [s.label for s in record.attempts() if s.state == "done"] == [str(winner)]
    assert [path.name for path in record.folder.glob("*.unfinished-*")] == []


STAGE_THAT_HANGS = """
    import sys, time
    from pathlib import Path
    from halo_cluster import StageRecord
    record = StageRecord(Path(sys.argv[1]))
    attempt = record.begin_attempt()
    (record.folder / "half").write_text("half of it")
    print(attempt.label, flush=True)
    time.sleep(600)
"""


def kill_in_the_middle(record: StageRecord) -> int:
    """Run a stage in a child and kill -9 it; returns its pid, which is a zombie's until it is waited for."""
    command = [sys.executable, "-c", textwrap.dedent(STAGE_THAT_HANGS), str(record.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "1\n"
        assert [status.state for status in record.attempts()] == ["running"]
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        (status,) = record.attempts()
        assert (status.state, status.pid) == ("interrupted", child.pid)
    return child.pid


def test_killed_attempt_is_counted_by_its_heartbeat_and_the_next_goes_on(record: StageRecord) -> None:
    pid = kill_in_the_middle(record)
    assert record.done() is None
    first = record.folder / "attempt.1"
    assert not (first / "exit.json").exists()
    assert read_json(first / "started.json")["pid"] == pid
    (first / "heartbeat").write_text("123.456\n")
    second, output = begin(record)
    assert second.label == "2"
    closed = read_json(first / "exit.json")
    assert (closed["state"], closed["seconds"]) == ("interrupted", 123.456)
    published = second.publish([output], {})
    assert published["attempt"] == "2"
    assert published["seconds"] >= 123.456


def test_attempt_killed_before_its_first_file_counts_nothing(record: StageRecord) -> None:
    (record.folder / "attempt.7").mkdir(parents=True)
    assert record.begin_attempt().label == "8"
    assert next((s.state, s.seconds) for s in record.attempts()) == ("interrupted", 0.0)


def test_begin_attempt_removes_what_killed_writers_left(record: StageRecord) -> None:
    leftover = record.folder / "store.unfinished-0a1b2c3d"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("half")
    record.begin_attempt()
    assert not leftover.exists()


def test_what_a_worker_may_be_writing_is_removed_when_the_stage_is_done(record: StageRecord) -> None:
    attempt, output = begin(record)
    deep = record.folder / "tasks" / "workers" / "one.json.unfinished-0a1b2c3d"
    deep.parent.mkdir(parents=True)
    deep.write_text("half")
    record.cleanup()
    assert deep.exists()
    published = attempt.publish([output], {})
    record.cleanup()
    assert not deep.exists() and deep.parent.exists()
    assert published["outputs"] == checksums(record, published)


def test_checkpoints_stay_until_the_stage_is_published(record: StageRecord, monkeypatch) -> None:
    attempt, output = begin(record)
    checkpoint = record.folder / "checkpoints" / "step-00000008"
    checkpoint.mkdir(parents=True)
    publish_once = halo_cluster.record.publish_once

    def publish(path: Path, content: Any) -> bool:
        assert checkpoint.is_dir()
        return publish_once(path, content)

    monkeypatch.setattr("halo_cluster.record.publish_once", publish)
    attempt.publish([output], {})
    assert not checkpoint.parent.exists()


def test_checkpoints_of_a_stage_that_was_killed_after_its_publication_are_removed(
    record: StageRecord,
) -> None:
    attempt, output = begin(record)
    attempt.publish([output], {})
    (record.folder / "checkpoints" / "step-00000008").mkdir(parents=True)
    record.cleanup()
    assert not (record.folder / "checkpoints").exists()


def test_the_end_can_be_recorded_on_a_full_disk(mounted_disk) -> None:
    disk = mounted_disk("200k")
    record = StageRecord(disk / "small" / "align" / input_hash({}))

    def fill() -> None:
        with suppress(OSError), open(disk / "filler", "ab", buffering=0) as file:
            while True:
                file.write(bytes(512))

    attempt = record.begin_attempt()
    fill()
    attempt.end("failed", "no space was left")
    fill()
    with pytest.raises(StorageError, match="No space left on device"):
        record.begin_attempt()
    assert [(a.state, a.reason) for a in record.attempts()] == [("failed", "no space was left")], (
        "an attempt that could not begin is none"
    )


def test_truncated_or_missing_output_is_named_with_the_fix(record: StageRecord) -> None:
    attempt, output = begin(record)
    attempt.publish([output], {})
    output.write_text("wei")
    with pytest.raises(ValueError, match=r"model\.bin has 3 bytes instead of 7; restore it, or remove"):
        record.done()
    output.unlink()
    with pytest.raises(ValueError, match=r"model\.bin is missing; restore it, or remove"):
        record.done()


def test_checksums_tell_changed_content_of_equal_size(record: StageRecord) -> None:
    attempt, output = begin(record)
    published = attempt.publish([output], {})
    output.write_text("WEIGHTS")
    assert record.done() == published
    assert published["outputs"] != checksums(record, published)


def test_done_file_of_another_stage_is_refused(record: StageRecord) -> None:
    attempt, output = begin(record)
    attempt.publish([output], {})
    moved = StageRecord(record.folder.with_name("0123456789ab"))
    record.folder.rename(moved.folder)
    with pytest.raises(ValueError, match=f"belongs to distill.uniform/{record.input_hash}; move it back"):
        moved.done()


def test_broken_done_file_is_named(record: StageRecord) -> None:
    record.folder.mkdir(parents=True)
    (record.folder / "DONE.json").write_text("{")
    with pytest.raises(ValueError, match=r"DONE\.json is not valid JSON"):
        record.done()
    (record.folder / "DONE.json").write_text('{"stage": "distill.uniform"}')
    with pytest.raises(ValueError, match=r"lacks 'input_hash'; remove .* to run the stage again"):
        record.done()


def test_output_that_was_not_written_or_lies_elsewhere_is_a_failure(
    record: StageRecord, tmp_path: Path
) -> None:
    attempt = record.begin_attempt()
    with pytest.raises(RuntimeError, match=r"did not write its output .*missing\.bin"):
        attempt.publish([record.folder / "missing.bin"], {})
    (record.folder / "empty").mkdir()
    with pytest.raises(RuntimeError, match=r"did not write its output .*empty"):
        attempt.publish([record.folder / "empty"], {})
    elsewhere = tmp_path / "elsewhere.bin"
    elsewhere.write_text("x")
    with pytest.raises(RuntimeError, match="is not in its stage's folder"):
        attempt.publish([elsewhere], {})
    assert record.done() is None
