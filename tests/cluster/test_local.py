"""The local executor."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from halo_cluster import Attempt, PlannedStage, RunFolder, StageFailed, StageRecord, StageResult, run_stages
from halo_cluster.record import DONE_FILE


def shown(console: Console) -> list[str]:
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_stages_run_in_order_and_only_once(run: RunFolder, counting, console: Console) -> None:
    init, align = counting(run.stage("init", "0" * 12)), counting(run.stage("align", "1" * 12))
    plan = [init.planned(), align.planned("init")]
    published = run_stages(plan, console)
    assert [line.rstrip("0123456789. s") for line in shown(console)] == [
        "init running",
        "init done",
        "align running",
        "align done",
    ]
    assert list(published) == ["init", "align"]
    assert published["align"]["summary"] == {"runs": 1}
    assert run_stages(plan, console) == published
    assert (init.runs, align.runs) == (1, 1)
    assert shown(console)[-1].endswith("in an earlier run")


def test_plan_with_a_stage_before_its_input_is_a_bug(run: RunFolder, counting, console: Console) -> None:
    with pytest.raises(AssertionError, match="align is planned before its inputs"):
        run_stages([counting(run.stage("align", "1" * 12)).planned("init")], console)


def test_failure_names_stage_and_log_and_keeps_what_is_done(
    run: RunFolder, counting, console: Console
) -> None:
    init = counting(run.stage("init", "0" * 12))
    align = counting(run.stage("align", "1" * 12), error=RuntimeError("loss is NaN at step 7.\nsecond line"))
    plan = [init.planned(), align.planned("init")]
    with pytest.raises(StageFailed) as failure:
        run_stages(plan, console)
    log = align.record.folder / "attempt.1" / "log.txt"
    assert str(failure.value) == f"stage align failed: loss is NaN at step 7; the traceback is in {log}"
    assert "RuntimeError: loss is NaN at step 7." in log.read_text()
    assert [(s.state, s.reason) for s in align.record.attempts()] == [("failed", "loss is NaN at step 7")]
    assert init.record.done() is not None
    align.error = None
    published = run_stages(plan, console)
    assert published["align"]["attempt"] == "2"
    assert (init.runs, align.runs) == (1, 2)


def test_user_error_passes_through_and_is_recorded(record: StageRecord, counting, console: Console) -> None:
    error = ValueError("corpus.txt holds no text; give another file")
    with pytest.raises(ValueError) as passed:
        run_stages([counting(record, error=error).planned()], console)
    assert passed.value is error
    assert [(s.state, s.reason) for s in record.attempts()] == [("failed", str(error))]


def test_disk_error_of_a_stage_comes_with_its_mend(record: StageRecord, counting, console: Console) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.bin")
    with pytest.raises(StageFailed, match=r"No space left on device \(model\.bin\); free some space there"):
        run_stages([counting(record, error=error).planned()], console)


def test_full_disk_does_not_hide_the_failure(
    record: StageRecord, counting, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail_on_a_full_disk(attempt: Attempt) -> StageResult:
        monkeypatch.setattr(os, "fsync", full)
        raise RuntimeError("what really went wrong")

    with pytest.raises(StageFailed, match="what really went wrong"):
        run_stages([PlannedStage("distill.uniform", record, fail_on_a_full_disk)], console)
    monkeypatch.undo()
    again = run_stages([counting(record).planned()], console)
    assert again["distill.uniform"]["attempt"] == "2"


def test_publishing_on_a_full_disk_leaves_the_stage_undone(
    record: StageRecord, counting, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = counting(record)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run_and_fill(attempt: Attempt) -> StageResult:
        result = stage(attempt)
        monkeypatch.setattr(os, "fsync", full)
        return result

    with pytest.raises(StageFailed, match="No space left on device; free some space there"):
        run_stages([PlannedStage("distill.uniform", record, run_and_fill)], console)
    monkeypatch.undo()
    assert record.done() is None
    assert run_stages([stage.planned()], console)["distill.uniform"]["attempt"] == "2"


def test_what_killed_writers_left_is_removed_by_the_next_call(
    record: StageRecord, counting, console: Console
) -> None:
    stage = counting(record)
    run_stages([stage.planned()], console)
    (attempt,) = record.folder.glob("attempt.*")
    for folder in (attempt, record.folder):
        (folder / "exit.json.unfinished-0a1b2c3d").write_text("half")
    (attempt / "exit.json").unlink()  # killed after DONE.json was published
    run_stages([stage.planned()], console)
    assert not list(record.folder.rglob("*.unfinished-*"))
    assert [status.state for status in record.attempts()] == ["interrupted"]


def test_interrupt_is_recorded_and_resumed(record: StageRecord, counting, console: Console) -> None:
    stage = counting(record, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_stages([stage.planned()], console)
    assert [(s.state, s.reason) for s in record.attempts()] == [("interrupted", "Ctrl-C")]
    assert shown(console)[-1] == "distill.uniform interrupted the same command resumes here"
    stage.error = None
    assert run_stages([stage.planned()], console)["distill.uniform"]["attempt"] == "2"
    assert "attempt 2, after 0.0 s in earlier ones" in shown(console)[-2]


def test_library_logs_reach_the_attempt(record: StageRecord, console: Console) -> None:
    def noisy(attempt: Attempt) -> StageResult:
        attempt.log("starting")
        logging.getLogger("some.library").warning("slow path taken")
        (record.folder / "result.txt").write_text("x")
        return StageResult([record.folder / "result.txt"], {})

    run_stages([PlannedStage("distill.uniform", record, noisy)], console)
    logging.getLogger("some.library").warning("after the stage")
    log = (record.folder / "attempt.1" / "log.txt").read_text()
    assert "starting" in log
    assert "WARNING some.library: slow path taken" in log
    assert "after the stage" not in log


DRIVER = """
    import signal, sys, time
    from pathlib import Path
    from rich.console import Console
    from halo_cluster import PlannedStage, RunFolder, StageResult, run_stages

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    run = RunFolder(Path(sys.argv[1]))

    def quick(attempt):
        (attempt.record.folder / "out").write_text("quick")
        return StageResult([attempt.record.folder / "out"], {})

    def slow(attempt):
        steps = attempt.record.folder / "steps"
        for step in range(int(steps.read_text()) if steps.exists() else 0, 4):
            steps.write_text(str(step + 1))
            print(step, flush=True)
            sys.stdin.readline()
        return StageResult([steps], {})

    with run.opened():
        stages = [("init", "0" * 12, quick, ()), ("align", "1" * 12, slow, ("init",))]
        plan = [PlannedStage(name, run.stage(name, key), body, needs) for name, key, body, needs in stages]
        run_stages(plan, Console(quiet=True))
"""


def drive(run: RunFolder, steps: int, end: signal.Signals | None) -> list[int]:
    """Run the driver in a process until it has said `steps` steps, end it if asked; returns the steps."""
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(run.folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        said = [int(child.stdout.readline())]
        while len(said) < steps:
            child.stdin.write("\n")
            child.stdin.flush()
            said.append(int(child.stdout.readline()))
        if end is None:
            child.stdin.write("\n")
        else:
            child.send_signal(end)
            child.wait()
    return said


def test_killed_driver_resumes_where_it_was(run: RunFolder) -> None:
    init, align = run.stage("init", "0" * 12), run.stage("align", "1" * 12)
    assert drive(run, 2, signal.SIGKILL) == [0, 1]
    done_once = (init.folder / DONE_FILE).stat()
    assert align.done() is None
    assert drive(run, 1, signal.SIGINT) == [2]
    assert align.done() is None
    assert drive(run, 1, None) == [3]
    published = align.done()
    assert published is not None
    assert published["attempt"] == "3"
    states = [(status.state, status.reason) for status in align.attempts()]
    assert states == [
        ("interrupted", "killed, or the machine stopped"),
        ("interrupted", "Ctrl-C"),
        ("done", ""),
    ]
    assert published["seconds"] == pytest.approx(sum(s.seconds for s in align.attempts()), abs=1.0)
    assert len(init.attempts()) == 1
    assert (init.folder / DONE_FILE).stat().st_mtime_ns == done_once.st_mtime_ns


def test_stage_folder_is_named_after_the_stage(tmp_path: Path) -> None:
    record = RunFolder(tmp_path / "demo").stage("distill.uniform", "0123456789ab")
    assert record.folder == tmp_path / "demo" / "distill.uniform" / "0123456789ab"
