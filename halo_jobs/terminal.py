"""What reaches the terminal: one sentence for an error, and no warnings of libraries about themselves."""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

# Stopped on request with everything saved: EX_TEMPFAIL of sysexits.h, "try again later".
STOPPED_EXIT_CODE = 75

# They warn of absent Apex and Transformer Engine, of future APIs, of a world of one process.
_CHATTY_WARNINGS = re.compile(r"[/\\](megatron|torch[/\\]distributed)[/\\]")
_CHATTY_LOGGERS = ("torch.utils.cpp_extension", "torch.distributed", "megatron")


def quieten_libraries() -> None:
    """Keep known irrelevant warnings of libraries off the terminal; inside a stage they go to the attempt's log.txt."""
    to_terminal = warnings.showwarning
    log = logging.getLogger("halo_jobs.warnings")
    log.addHandler(logging.NullHandler())  # otherwise logging writes to stderr itself while no stage runs

    def show(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any, **named: Any) -> None:
        if _CHATTY_WARNINGS.search(filename):
            log.warning("%s:%s: %s: %s", filename, lineno, category.__name__, message)
        else:
            to_terminal(message, category, filename, lineno, *rest, **named)

    warnings.showwarning = show
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def sentence(problem: BaseException) -> str:
    """An exception in one line; an error of the operating system with the file that it concerns."""
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
