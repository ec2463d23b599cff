"""The `halo` command, as users type it."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.fork_server import CONTEXT


def halo_command(*arguments: object) -> list[str]:
    """The command line of `halo ARGUMENTS` in a fresh interpreter: for tests that kill, signal or watch the process."""
    return [sys.executable, "-m", "halo_jobs.cli", *map(str, arguments)]


def set_options(*changes: str) -> list[str]:
    """`--set KEY=VALUE` for each change."""
    return [word for change in changes for word in ("--set", change)]


def halo(*arguments: object, seconds: float = 280.0) -> subprocess.CompletedProcess[str]:
    """Run `halo ARGUMENTS` to its end in a process of its own, which has its modules imported already."""
    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        process = CONTEXT.Process(target=_main, args=(words, os.getcwd(), dict(os.environ), stdout, stderr))
        process.start()
        process.join(seconds)
        ended = process.exitcode
        if ended is None:
            process.kill()
            process.join()
        said = stdout.read_text(), stderr.read_text()
    assert ended is not None, f"halo {' '.join(words)} ran for more than {seconds:.0f} s: {said}"
    return subprocess.CompletedProcess(["halo", *words], ended, *said)


def checked_halo(*arguments: object, seconds: float = 280.0) -> str:
    """What `halo ARGUMENTS` prints; the test fails when the command does."""
    done = halo(*arguments, seconds=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def error_sentence(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The sentence that is all of stderr, after the command ended with `code`."""
    assert result.returncode == code, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def _main(words: list[str], folder: str, environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["halo", *words]
    from halo_jobs.cli import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # forked processes of multiprocessing end without them
