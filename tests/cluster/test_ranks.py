"""Processes that work together on several nodes, as one of the nodes sees it."""

from __future__ import annotations

import sys

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
