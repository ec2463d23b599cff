"""A progress bar for terminals."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class ProgressBar:
    """Context manager: a bar with the time elapsed and left. Nothing is shown if `console` is not a terminal.

    Args:
        title: what is in progress.
        total: amount of work, in items or bytes.
        console: stderr if None.
        in_bytes: whether `total` counts bytes.
    """

    def __init__(self, title: str, total: int, console: Console | None = None, *, in_bytes: bool = False):
        console = console or Console(stderr=True)
        amounts = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            *amounts,
            TextColumn("{task.fields[remark]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total, remark="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, amount: int, remark: str | None = None) -> None:
        """Add to the amount done, and replace the remark beside it unless None."""
        if remark is not None:
            self._progress.update(self._task, remark=remark)
        self._progress.advance(self._task, amount)
