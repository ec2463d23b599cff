"""Processes that work together on several nodes, as one of the nodes sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from halo_cluster import Nodes, RankFailed, run_ranks


def test_ranks_that_wait_for_a_node_that_failed_are_ended(tmp_path, free_port):
    """Before all ranks have met, those here could not know that another will never come."""
    command = [sys.executable, "-c", "import time; time.sleep(200)"]
    with pytest.raises(RankFailed, match="on another node"):
        run_ranks(command, 2, tmp_path, Nodes(2, 0, "127.0.0.1", free_port), lambda: True)


def test_an_end_elsewhere_does_not_cut_short_what_a_rank_has_to_say(tmp_path, free_port):
    command = [sys.executable, "-c", "import time; time.sleep(2); raise SystemExit(3)"]
    with pytest.raises(RankFailed, match="process 0 of 2 ended with code 3"):
        run_ranks(command, 2, tmp_path, Nodes(2, 0, "127.0.0.1", free_port), lambda: True)


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_ranks_end_with_a_parent_that_is_killed(tmp_path, free_port, stopped):
    rank = """
        import os, sys, time
        from pathlib import Path
        from halo_cluster import end_with_parent
        end_with_parent()
        Path(sys.argv[1], "pid").write_text(str(os.getpid()))
        time.sleep(200)
    """
    parent = """
        import sys
        from pathlib import Path
        from halo_cluster import Nodes, run_ranks
        command = [sys.executable, "-c", sys.argv[3], sys.argv[1]]
        run_ranks(command, 1, Path(sys.argv[1]), Nodes(1, 0, "127.0.0.1", int(sys.argv[2])), lambda: False)
    """
    words = [textwrap.dedent(parent), str(tmp_path), str(free_port), textwrap.dedent(rank)]
    with subprocess.Popen([sys.executable, "-c", *words]) as process:
        end = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (said := (tmp_path / "pid").read_text()):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        pid = int(said)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        process.kill()
    while _runs(pid):
        assert time.monotonic() < end, "the rank is still there"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
