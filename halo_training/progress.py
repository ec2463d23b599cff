"""Progress of a running stage: a bar on the terminal, log lines, TensorBoard events, and files for the monitoring."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from durable_files import write_json, write_text
from halo_training.files import METRICS_FILE, PROGRESS_FILE
from terminal_output import ProgressBar

LINE_INTERVAL_SECONDS = 10.0
WARM_UP_SECONDS = 1.0

_log = logging.getLogger("halo_training.progress")
_log.setLevel(logging.INFO)  # for the log of the attempt; a terminal shows the bar


def peak_memory() -> tuple[int, int | None]:
    """Peak of this process in bytes: resident host memory, and tensors on the GPU (None without CUDA)."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


class MetricsLog:
    """metrics.jsonl and TensorBoard events of one stage. Drops lines after the step that training resumes from.

    `writes` is True on one rank only. On the others all methods do nothing.
    """

    def __init__(self, folder: Path, *, resume_step: int, writes: bool = True):
        self.path = folder / METRICS_FILE
        self.elapsed_before = 0.0
        self._writes = writes
        if writes:
            self._open(folder, resume_step)

    def _open(self, folder: Path, resume_step: int) -> None:
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break  # the last line, cut short by a kill
            if entry["step"] <= resume_step:
                kept.append(line)
                self.elapsed_before = entry["elapsed_seconds"]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed by close())
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, metrics: dict[str, float | None]) -> None:
        """Add a line. `step` counts finished steps."""
        if not self._writes:
            return
        self._file.write(json.dumps(metrics) + "\n")
        for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second"):
            self._events.add_scalar(name, metrics[name], metrics["step"])

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._events.close()


class ProgressReporter:
    """Shows progress as a bar on a terminal, otherwise as a line every few seconds. The log always has the lines.

    `folder` gets a progress.json for the monitoring. A training passes None, because its metrics.jsonl has the same
    information.
    """

    def __init__(self, title: str, total: int, console: Console, folder: Path | None = None):
        self._title, self._total, self._console = title, total, console
        self._bar = ProgressBar(title, total, console)
        self._shown = 0
        self._started = self._last_line = time.monotonic()
        self._measured_from: tuple[float, int] | None = None
        self._file = folder / PROGRESS_FILE if folder else None
        self._write_file(0, None)

    @contextmanager
    def live(self) -> Iterator[ProgressReporter]:
        with self._bar:
            yield self

    def update(self, done: int, numbers: str) -> None:
        """Report `done` finished items of the total. `numbers` is text shown beside them."""
        self._bar.advance(done - self._shown, numbers)
        self._shown = done
        now = time.monotonic()
        left = self._seconds_left(now, done)
        self._write_file(done, left)
        if now - self._last_line >= LINE_INTERVAL_SECONDS or done >= self._total:
            self._last_line = now
            line = f"{self._title}: {done}/{self._total}  {numbers}  about {left or 0.0:.0f} s left"
            _log.info(line)
            if not self._console.is_terminal:
                self._console.print(line, highlight=False)

    def _seconds_left(self, now: float, done: int) -> float | None:
        """Estimated from the speed so far. Items reported within WARM_UP_SECONDS come from an earlier attempt."""
        if self._measured_from is None:
            self._measured_from = (self._started, done - 1)
        if done >= self._total:
            return 0.0
        if now - self._started < WARM_UP_SECONDS:
            self._measured_from = (now, done)
            return None
        since, before = self._measured_from
        return (now - since) / (done - before) * (self._total - done)

    def _write_file(self, done: int, seconds_left: float | None) -> None:
        if self._file is not None:
            content = {"title": self._title, "done": done, "total": self._total, "seconds_left": seconds_left}
            with suppress(OSError):  # the stage reports a full disk where it loses data
                write_json(self._file, content)
