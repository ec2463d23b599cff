"""Requests to stop and interrupts, each in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(body: str) -> subprocess.CompletedProcess[str]:
    prelude = """
        import os, signal, sys, time
        from halo_cluster import signals
        def send(number):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def test_a_repeated_signal_is_the_same_request_and_a_later_one_ends_the_process():
    done = run("""
        signals.REPEAT_SECONDS = 1.0
        received = []
        with signals.on_stop_request(received.append):
            send(signal.SIGTERM)
            send(signal.SIGTERM)
            print([number.name for number in received], signals.stop_requested(), flush=True)
            time.sleep(1.1)
            send(signal.SIGTERM)
        print("still there")
    """)
    assert done.stdout == "['SIGTERM', 'SIGTERM'] True\n"
    assert done.returncode == -signal.SIGTERM


def test_handlers_are_restored_after_the_block():
    done = run("""
        with signals.on_stop_request(print):
            pass
        send(signal.SIGUSR2)
    """)
    assert done.returncode == -signal.SIGUSR2


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 0)])
def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_is_the_same_request(number, code):
    done = run(f"""
        interrupts = signals.InterruptHandler()
        try:
            send(signal.{number})
            time.sleep(10)
        except KeyboardInterrupt:
            send(signal.{number})
            assert interrupts.requested
    """)
    assert done.returncode == code, done.stderr
    assert ("interrupted; the same command resumes" in done.stderr) == (code == 130)


def test_a_shutdown_that_takes_too_long_is_ended():
    done = run("""
        signals.SHUTDOWN_SECONDS = 0.3
        signals.InterruptHandler(last=lambda: 7)
        try:
            send(signal.SIGINT)
        except KeyboardInterrupt:
            time.sleep(30)
    """)
    assert done.returncode == 7


HELD_BACK = """
from halo_cluster import signals
signals.on_signals(signals.STOP_SIGNALS, lambda number: print("received", number.name))
signals.unblock_stop_signals()
"""


def test_a_request_during_exec_is_held_back_until_the_new_program_has_its_handlers():
    done = run(f"""
        signals.block_stop_signals()
        send(signal.SIGTERM)
        os.execv(sys.executable, [sys.executable, "-c", {HELD_BACK!r}])
    """)
    assert (done.stdout, done.returncode) == ("received SIGTERM\n", 0)


def test_no_other_module_of_the_product_sets_a_signal_handler():
    rooms = ("halo_*", "hypenet_*", "sharded_tensors", "tokenized_data", "durable_files", "cluster", "tools")
    files = [path for room in rooms for folder in ROOT.glob(room) for path in folder.rglob("*.py")]
    found = {path.name for path in files if re.search(r"signal\.signal\(", path.read_text())}
    assert found == {"signals.py"}
