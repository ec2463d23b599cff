"""Processes that work together on several nodes, as one of the nodes sees it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from durable_files import ProcessIdentity, read_json
from halo_cluster import AttemptStatus, ExitReport, Nodes, RankFailed, run_ranks
from halo_cluster.attempts import KILLED, cause, close_abandoned


def report_of_the_other_node(attempt: Path) -> None:
    ExitReport("failed", "the disk of n2 is full", "n2", rank=1).publish(attempt / "rank-1.json")


def test_ranks_that_wait_for_a_node_that_failed_are_ended(tmp_path, monkeypatch):
    """Before all ranks have met, those here could not know that another will never come."""
    monkeypatch.setattr("halo_cluster.ranks._NOTICE_SECONDS", 0.5)
    report_of_the_other_node(tmp_path)
    command = [sys.executable, "-c", "import time; time.sleep(200)"]
    with pytest.raises(RankFailed, match="the disk of n2 is full") as failure:
        run_ranks(command, 2, tmp_path, Nodes(2, 0))
    assert failure.value.host == "n2"


def test_an_end_elsewhere_does_not_cut_short_a_ranks_own_end(tmp_path):
    report_of_the_other_node(tmp_path)
    command = [sys.executable, "-c", "import time; time.sleep(2); raise SystemExit(3)"]
    with pytest.raises(RankFailed, match=r"rank 0 of 2 ended with code 3 on \S+"):
        run_ranks(command, 2, tmp_path, Nodes(2, 0))


@pytest.mark.parametrize(
    "states", list(itertools.permutations(["done", "affected", "interrupted", "failed", "lost"]))
)
def test_the_rank_at_fault_is_the_one_that_others_are_affected_by(states):
    reports = [ExitReport(state, rank=rank) for rank, state in enumerate(states)]
    for worst in ("lost", "failed", "interrupted", "affected"):
        assert cause(reports).state == worst
        reports = [report for report in reports if report.state != worst]
    assert cause(reports) is None


def test_of_two_failures_the_first_is_the_cause():
    late = ExitReport("failed", "the connection was reset", rank=0, ended="2026-11-30T12:00:00.500+00:00")
    early = ExitReport("failed", "loss is nan", rank=1, ended="2026-11-30T12:00:00.250+00:00")
    assert cause([late, early]) is early


@pytest.mark.parametrize("state", ["done", "failed"])
def test_a_rank_that_crashes_after_its_report_has_ended_as_it_reported(tmp_path, state):
    rank = f"""
        import os, sys, time
        from pathlib import Path
        from halo_cluster import ExitReport, end_with_parent
        end_with_parent()
        number = int(os.environ["RANK"])
        state = {state!r} if number == 1 else "done"
        ExitReport(state, "loss is nan", rank=number).publish(Path(sys.argv[1]) / f"rank-{{number}}.json")
        while not all((Path(sys.argv[1]) / f"rank-{{other}}.json").exists() for other in (0, 1)):
            time.sleep(0.05)
        os._exit(number)
    """
    command = [sys.executable, "-c", textwrap.dedent(rank), str(tmp_path)]
    if state == "done":
        run_ranks(command, 2, tmp_path)
        return
    with pytest.raises(RankFailed, match="loss is nan"):
        run_ranks(command, 2, tmp_path)


def test_a_rank_that_is_ended_with_the_others_is_not_the_cause(tmp_path):
    """It is sent SIGTERM, and would report a request to stop."""
    rank = """
        import os, signal, sys, time
        from pathlib import Path
        from halo_cluster import AttemptStatus, ExitReport, end_with_parent
        end_with_parent()
        number = int(os.environ["RANK"])
        def stop(*_):
            report = ExitReport("interrupted", "stopped by SIGTERM", rank=number)
            report.publish(Path(sys.argv[1]) / f"rank-{number}.json")
            os._exit(75)
        signal.signal(signal.SIGTERM, stop)
        (Path(sys.argv[1]) / f"ready-{number}").touch()
        while not all((Path(sys.argv[1]) / f"ready-{other}").exists() for other in (0, 1)):
            time.sleep(0.05)
        time.sleep(200 if number == 0 else 0)
        sys.exit(7)
    """
    with pytest.raises(RankFailed, match="rank 1 of 2 ended with code 7"):
        run_ranks([sys.executable, "-c", textwrap.dedent(rank), str(tmp_path)], 2, tmp_path)


def test_a_rank_about_to_report_the_cause_is_not_spoken_for(tmp_path):
    """Rank 1 notices at once that rank 0 has closed its connections. Rank 0 reports its own error a moment later."""
    rank = """
        import os, sys, time
        from pathlib import Path
        from halo_cluster import ExitReport, end_with_parent
        end_with_parent()
        number = int(os.environ["RANK"])
        report = ExitReport("affected", "connection reset", rank=1)
        if number == 0:
            while not (Path(sys.argv[1]) / "rank-1.json").exists():
                time.sleep(0.01)
            time.sleep(0.8)
            report = ExitReport("failed", "the disk is full", rank=0)
        report.publish(Path(sys.argv[1]) / f"rank-{number}.json")
        sys.exit(1)
    """
    with pytest.raises(RankFailed, match="the disk is full"):
        run_ranks([sys.executable, "-c", textwrap.dedent(rank), str(tmp_path)], 2, tmp_path)


def test_ranks_that_load_when_those_of_another_node_stop_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("halo_cluster.ranks._STOP_NOTICE_SECONDS", 0.5)
    ExitReport("interrupted", "stopped by SIGUSR2", rank=1).publish(tmp_path / "rank-1.json")
    with pytest.raises(RankFailed, match="SIGUSR2") as failure:
        run_ranks(["sleep", "200"], 2, tmp_path, Nodes(2, 0))
    assert failure.value.report.state == "interrupted"


def test_a_request_to_stop_while_ranks_are_starting_is_no_failure(tmp_path):
    """A rank that has no handler yet is killed by the signal that its parent passes on."""
    parent = """
        import sys
        from pathlib import Path
        from halo_cluster import RankFailed, run_ranks
        try:
            run_ranks(["sleep", "200"], 1, Path(sys.argv[1]))
        except RankFailed as failed:
            print(failed.report.state, failed)
    """
    command = [sys.executable, "-c", textwrap.dedent(parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            time.sleep(0.02)
        time.sleep(0.3)
        process.terminate()
        assert process.stdout.read() == "interrupted stopped by SIGTERM while rank 0 was starting\n"


@pytest.mark.parametrize(
    ("state", "reason"), [("interrupted", "align: stopped by SIGTERM after step 4"), ("affected", KILLED)]
)
def test_an_attempt_killed_after_its_ranks_had_stopped_has_their_reason(tmp_path, state, reason):
    """Slurm may kill the stage's process a few seconds after its request to stop."""
    ExitReport(state, "align: stopped by SIGTERM after step 4", rank=0).publish(tmp_path / "rank-0.json")
    close_abandoned(tmp_path)
    end = ExitReport.read(tmp_path / "exit.json")
    assert end is not None and (end.state, end.reason) == ("interrupted", reason)


def test_other_nodes_reports_are_not_waited_for_once_they_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr("halo_cluster.ranks._ERROR_PROPAGATION_SECONDS", 600.0)
    report_of_the_other_node(tmp_path)
    with pytest.raises(RankFailed):
        run_ranks([sys.executable, "-c", "raise SystemExit(3)"], 2, tmp_path, Nodes(2, 0))


def test_an_attempt_of_another_version_is_named(tmp_path):
    attempt = tmp_path / "run" / "align" / "0123456789ab" / "attempt.1"
    attempt.mkdir(parents=True)
    (attempt / "exit.json").write_text('{"outcome": "done"}')
    with pytest.raises(ValueError, match=f"is from another version of halo; remove {tmp_path / 'run'}"):
        AttemptStatus.read(attempt)


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_ranks_end_with_a_parent_that_is_killed(tmp_path, stopped):
    rank = """
        import sys, time
        from dataclasses import asdict
        from pathlib import Path
        from durable_files import write_json
        from halo_cluster import end_with_parent
        from durable_files import ProcessIdentity
        end_with_parent()
        write_json(Path(sys.argv[1]), asdict(ProcessIdentity.current()))
        time.sleep(200)
    """
    parent = """
        import sys
        from pathlib import Path
        from halo_cluster import run_ranks
        logs, rank, who = sys.argv[1:]
        run_ranks([sys.executable, "-c", rank, who], 1, Path(logs))
    """
    who, end = tmp_path / "who.json", time.monotonic() + 60
    words = [textwrap.dedent(parent), str(tmp_path), textwrap.dedent(rank), str(who)]
    with subprocess.Popen([sys.executable, "-c", *words]) as process:
        while not who.exists():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        identity = ProcessIdentity.from_json(read_json(who))
        if stopped:
            os.kill(identity.pid, signal.SIGSTOP)
        process.kill()
    while not identity.has_ended():
        assert time.monotonic() < end, "the rank is still there"
        time.sleep(0.05)
