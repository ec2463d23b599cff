"""Child processes: their logs, their end, and that they do not outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from halo_cluster.children import end_children, start_child

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(200)
"""
POOL = """
    import sys, time
    from halo_cluster.children import process_pool
    from tests.cluster.test_children import note_pid
    if __name__ == "__main__":
        pool = process_pool(1, note_pid, sys.argv[1])
        pool.submit(time.sleep, 200)
        time.sleep(200)
"""


def note_pid(path: str) -> None:
    Path(path).write_text(str(os.getpid()))


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace_time(tmp_path):
    log = tmp_path / "log.txt"
    children = [start_child([sys.executable, "-c", STUBBORN], log=log), start_child(["sleep", "200"])]
    wait_until(lambda: log.read_text() == "ready\n")
    end_children(children, 0.2)
    assert [child.returncode for child in children] == [-signal.SIGKILL, -signal.SIGTERM]


def test_the_processes_of_a_pool_end_with_a_parent_that_is_killed(tmp_path):
    script, noted = tmp_path / "main.py", tmp_path / "pid"
    script.write_text(textwrap.dedent(POOL))
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, str(script), str(noted)], env=environment) as parent:
        wait_until(lambda: noted.exists() and noted.read_text())
        parent.kill()
    pid = int(noted.read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text())
