"""What a training stage shows while it runs: a progress bar, a JSON-lines log, TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from durable_files import write_text

PLAIN_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl; `step` counts finished steps."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    elapsed_seconds: float
    consumed_samples: int
    consumed_tokens: int


class MetricsLog:
    """metrics.jsonl and TensorBoard events of one stage. Lines after the step resumed from are dropped.

    Of the processes that train together one `writes`; in the others nothing happens.
    """

    def __init__(self, folder: Path, *, resume_step: int, writes: bool = True):
        self.path = folder / "metrics.jsonl"
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
                break  # a line that a kill cut short; everything after it is gone too
            if entry["step"] <= resume_step:
                kept.append(line)
                self.elapsed_before = entry["elapsed_seconds"]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed by close())
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, metrics: StepMetrics) -> None:
        if not self._writes:
            return
        self._file.write(json.dumps(asdict(metrics)) + "\n")
        for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second"):
            self._events.add_scalar(name, getattr(metrics, name), metrics.step)

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._events.close()


class ProgressReporter:
    """A live bar on a terminal; elsewhere (log files, CI) one plain line every few seconds."""

    def __init__(self, title: str, total: int, console: Console):
        self._title, self._total, self._console = title, total, console
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, numbers="")
        self._started = self._last_line = time.monotonic()
        self._first: int | None = None

    @contextmanager
    def live(self) -> Iterator[ProgressReporter]:
        with self._bar:
            yield self

    def update(self, done: int, numbers: str) -> None:
        self._bar.update(self._task, completed=done, numbers=numbers)
        if self._first is None:
            self._first = done - 1
        now = time.monotonic()
        if self._console.is_terminal or (now - self._last_line < PLAIN_LINE_SECONDS and done < self._total):
            return
        self._last_line = now
        left = (now - self._started) / (done - self._first) * (self._total - done)
        self._console.print(
            f"{self._title}: {done}/{self._total}  {numbers}  about {left:.0f} s left", highlight=False
        )
