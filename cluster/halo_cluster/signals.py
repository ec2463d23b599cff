"""The only place where signal handlers are set.

SIGTERM and SIGUSR2 are requests to stop: a user, a scheduler or a parent process sends them, sometimes several times
for one request. SIGINT is Ctrl-C. Handlers can be set in the main thread only; in another thread `on_stop_request`
changes nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
REPEAT_SECONDS = 3.0
"""The same signal again within this time belongs to the same request: Slurm signals processes directly and through
srun."""
SHUTDOWN_SECONDS = 20.0
INTERRUPTED_EXIT_CODE = 130

_stop_requested = False


def stop_requested() -> bool:
    """Whether this process has received SIGTERM or SIGUSR2 while one of the handlers below was set."""
    return _stop_requested


def _note(number: int) -> None:
    global _stop_requested
    _stop_requested = _stop_requested or number in STOP_SIGNALS


@contextmanager
def on_stop_request(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call `handle` for SIGTERM and SIGUSR2 while the block runs. A signal that is sent again later than
    REPEAT_SECONDS has the effect that it had before the block, which is to end the process, as a rule."""
    before: dict[int, Any] = {}
    first: dict[int, float] = {}

    def receive(number: int, frame: FrameType | None) -> None:
        _note(number)
        now = time.monotonic()
        if now - first.setdefault(number, now) < REPEAT_SECONDS:
            handle(signal.Signals(number))
        else:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, receive) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def on_signals(numbers: Iterable[signal.Signals], handle: Callable[[signal.Signals], None]) -> None:
    """Call `handle` for each of these signals, from now on."""

    def receive(number: int, frame: FrameType | None) -> None:
        _note(number)
        handle(signal.Signals(number))

    for number in numbers:
        signal.signal(number, receive)


def ignore(*numbers: signal.Signals) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def block_stop_signals() -> None:
    """Hold SIGTERM and SIGUSR2 back, also across `exec`, until `unblock_stop_signals`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def unblock_stop_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def wait_for(number: signal.Signals, seconds: float) -> None:
    """Return when `number` is received, or after `seconds`. Requests to stop have no other effect from now on."""
    block_stop_signals()
    signal.sigtimedwait([number], seconds)


class InterruptHandler:
    """Raises one KeyboardInterrupt at the first of `signals`, and makes sure that the process then ends.

    `requested` stays true, because a library may turn the KeyboardInterrupt into another exception. A run folder needs
    no orderly shutdown: a second Ctrl-C, a second request to stop, or a shutdown that takes longer than
    SHUTDOWN_SECONDS ends the process at once, with the exit code that `last` returns.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
        last: Callable[[], int] = lambda: INTERRUPTED_EXIT_CODE,
    ) -> None:
        self.requested = False
        self._last = last
        self._since = 0.0
        on_signals(signals, self._interrupt)
        on_signals((signal.SIGALRM,), lambda number: self.end())

    def _interrupt(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.requested:
            if number == signal.SIGINT or now - self._since > REPEAT_SECONDS:
                self.end()
            return
        self.requested, self._since = True, now
        signal.setitimer(signal.ITIMER_REAL, SHUTDOWN_SECONDS)
        raise KeyboardInterrupt("Ctrl-C" if number == signal.SIGINT else f"stopped by {number.name}")

    def end(self) -> NoReturn:
        """Exit without waiting for threads, and without Python's own shutdown, which may raise the signal again."""
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        with suppress(OSError):
            sys.stdout.flush()
        with suppress(OSError):
            os.write(2, b"interrupted; the same command resumes\n")
        os._exit(self._last())
