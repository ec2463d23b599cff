"""What `halo` and its terminal owe each other: an end when asked for, one sentence for an error, no chatter."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import NoReturn, TextIO

PATIENCE_SECONDS = 20.0
# Stopped on request with everything saved: EX_TEMPFAIL of sysexits.h, "try again later".
STOPPED_EXIT_CODE = 75

# They speak of absent Apex and Transformer Engine, of APIs to come, of a world of one process.
_CHATTY_WARNINGS = re.compile(r"[/\\](megatron|torch[/\\]distributed)[/\\]")
_CHATTY_LOGGERS = ("torch.utils.cpp_extension", "torch.distributed", "megatron")


class Interruption:
    """Turns each of `signals` into one KeyboardInterrupt, and sees to it that the process then ends.

    `requested` stays true, for code between here and main() may have made another exception of it. Nothing in a run
    folder needs an orderly end, so a second signal, or taking longer than PATIENCE_SECONDS, ends the process at once.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.requested = False
        for number in signals:
            signal.signal(number, self._interrupt)
        signal.signal(signal.SIGALRM, lambda number, frame: self.end())

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.end()
        self.requested = True
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS)
        raise KeyboardInterrupt(
            "Ctrl-C" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        )

    def end(self) -> NoReturn:
        """Say so and go, without waiting for threads and without Python's own end, which may repeat the signal."""
        with suppress(OSError):
            sys.stdout.flush()
        os.write(2, b"interrupted; the same command resumes\n")
        os._exit(130)


def quieten_libraries() -> None:
    """Keep known chatter of libraries off the terminal; inside a stage its attempt's log.txt has it."""
    to_terminal = warnings.showwarning
    log = logging.getLogger("halo_jobs.warnings")
    log.addHandler(logging.NullHandler())  # otherwise logging writes to stderr itself while no stage runs

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if _CHATTY_WARNINGS.search(filename):
            log.warning("%s:%s: %s: %s", filename, lineno, category.__name__, message)
        else:
            to_terminal(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def sentence(problem: BaseException) -> str:
    """An exception in one line; for an error of the operating system with the file it is about."""
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
