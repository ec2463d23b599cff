"""The table of faults that a session of tests made, printed at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FaultRow:
    """One fault and how it was survived.

    `seconds` is from the fault to the first step that was new after it, in a sweep until all that was lost was begun
    again. `equal` compares weights, or the results of a sweep.
    """

    fault: str
    seen: str
    attempts: int
    seconds: float
    equal: bool

    def cells(self) -> tuple[str, ...]:
        return (
            self.fault,
            self.seen,
            str(self.attempts),
            f"{self.seconds:.0f}",
            "yes" if self.equal else "NO",
        )


PROPERTY = "fault"  # of a test's report, which also comes from other processes
_HEADINGS = ("fault", "what the user saw", "attempts", "seconds to recover", "result equal")


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table that documents can take as they are, of FaultRow.cells()."""
    lines = [_HEADINGS, ("---", "---", "---:", "---:", "---"), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
