"""Processes that work together on several nodes, as one of the nodes sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from durable_files import read_json
from halo_cluster import Nodes, RankFailed, run_ranks
from halo_cluster.processes import ProcessIdentity


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
        import sys, time
        from dataclasses import asdict
        from pathlib import Path
        from durable_files import write_json
        from halo_cluster import end_with_parent
        from halo_cluster.processes import ProcessIdentity
        end_with_parent()
        write_json(Path(sys.argv[1]), asdict(ProcessIdentity.current()))
        time.sleep(200)
    """
    parent = """
        import sys
        from pathlib import Path
        from halo_cluster import Nodes, run_ranks
        logs, port, rank, who = sys.argv[1:]
        command = [sys.executable, "-c", rank, who]
        run_ranks(command, 1, Path(logs), Nodes(1, 0, "127.0.0.1", int(port)), lambda: False)
    """
    who, end = tmp_path / "who.json", time.monotonic() + 60
    words = [textwrap.dedent(parent), str(tmp_path), str(free_port), textwrap.dedent(rank), str(who)]
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
