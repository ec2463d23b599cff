"""Daemons with their identity on file, so that no other process is ever stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from .layout import SandboxError


def _start_ticks(pid: int) -> str | None:
    """Clock ticks from boot to the start of the process; None if it has ended or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def start(
    pid_file: Path, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Run `command` in a session of its own, with its output appended to `log`. It must stay in the foreground."""
    pid_file.parent.mkdir(exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    pid_file.write_text(f"{process.pid} {_start_ticks(process.pid)}\n")


def running(pid_file: Path) -> int | None:
    """The pid in `pid_file`, if it still is that process."""
    try:
        pid, start_ticks = pid_file.read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return int(pid) if _start_ticks(int(pid)) == start_ticks else None


def stop(pid_file: Path, how: signal.Signals = signal.SIGTERM, grace_seconds: float = 10) -> None:
    """Signal the process and wait for its end, with SIGKILL after `grace_seconds`. Does nothing if it has ended."""
    pid = running(pid_file)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, how)
        if not _wait(lambda: running(pid_file) is None, grace_seconds):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _wait(lambda: running(pid_file) is None, grace_seconds)
    pid_file.unlink(missing_ok=True)


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and all its descendants."""
    for child in children(pid):
        kill_tree(child)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found += [int(word) for word in task.read_text().split()]
    return found


def any_named(*names: str) -> bool:
    """Whether a running process of this machine has one of these names."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            start, _, rest = stat.read_text().rpartition(")")
            if start.partition("(")[2] in names and rest.split()[0] not in "ZX":
                return True
    return False


def wait_until(answers: Callable[[], bool], what: str, log: Path, seconds: float = 30) -> None:
    """Wait; SandboxError with `what` and its log if the condition is not met within `seconds`."""
    if not _wait(answers, seconds):
        raise SandboxError(f"{what} is not there after {seconds:.0f} s; its log {log} says why")


def _wait(answers: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not answers():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def call(*command: str, environment: Mapping[str, str] | None = None, text: str | None = None) -> str:
    """Standard output of a short command; SandboxError with its last line of stderr if it fails."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, input=text, timeout=60
    )
    if done.returncode != 0:
        complaint = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise SandboxError(f"'{' '.join(command)}' failed: {complaint}")
    return done.stdout


def succeeds(*command: str, environment: Mapping[str, str] | None = None) -> bool:
    """Whether a short command succeeds within five seconds."""
    try:
        return (
            subprocess.run(
                command,
                capture_output=True,
                check=False,
                env=environment,
                stdin=subprocess.DEVNULL,
                timeout=5,
            ).returncode
            == 0
        )
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return False
