"""How commands show progress and durations on a terminal. Imports only rich."""

from terminal_output.durations import duration
from terminal_output.progress_bar import ProgressBar

__all__ = ["ProgressBar", "duration"]
