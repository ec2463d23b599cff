"""Stops a run whose loss or gradient stopped making sense, and says on which batch."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field


class TrainingDiverged(RuntimeError):
    """A NaN, an infinity or a spike; `step` is 0-based, `samples` identify the batch in the data order."""

    def __init__(self, message: str, *, step: int, samples: tuple[int, ...]):
        super().__init__(message)
        self.step = step
        self.samples = samples


@dataclass
class DivergenceGuard:
    """Compares every step's loss with the median of the last `window` ones."""

    spike_factor: float
    window: int = 50
    recent: deque[float] = field(default_factory=deque)

    def check_loss(self, loss: float, *, step: int, samples: tuple[int, ...]) -> None:
        """Called before the update, so that a bad batch never reaches the weights."""
        if not math.isfinite(loss):
            self._stop(f"loss is {loss}", step, samples)
        if len(self.recent) >= self.window:
            median = statistics.median(self.recent)
            if loss > self.spike_factor * median:
                self._stop(
                    f"loss {loss:.4g} is {loss / median:.1f} times the median of recent steps", step, samples
                )
            self.recent.popleft()
        self.recent.append(loss)

    def check_gradient(self, norm: float, *, step: int, samples: tuple[int, ...]) -> None:
        """Called with the norm that the update was clipped by; the weights in memory are not used after a stop."""
        if not math.isfinite(norm):
            self._stop(f"gradient norm is {norm}", step, samples)

    def _stop(self, what: str, step: int, samples: tuple[int, ...]) -> None:
        raise TrainingDiverged(
            f"{what} at step {step + 1} (samples {samples[0]} to {samples[-1]}); the last checkpoint is intact: "
            "lower the learning rate, raise spike_factor, or look at the batch in bad_batch.json",
            step=step,
            samples=samples,
        )
