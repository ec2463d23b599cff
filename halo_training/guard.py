"""Stops a training whose loss or gradient diverges, and names the batch."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field


class TrainingDiverged(RuntimeError):
    """A NaN, an infinity or a spike. `step` is 0-based; `samples` are the sample numbers of its global batch."""

    def __init__(self, message: str, *, step: int, samples: tuple[int, ...]):
        super().__init__(message)
        self.step = step
        self.samples = samples


@dataclass
class DivergenceGuard:
    """Compares the loss of every step with the median of the last `window` losses. Raises TrainingDiverged."""

    spike_factor: float
    window: int = 50
    recent: deque[float] = field(default_factory=deque)

    def check_loss(self, loss: float, *, step: int, samples: tuple[int, ...]) -> None:
        """Check before the update, so that a bad batch does not reach the weights."""
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
        """Check the norm that the update returned. The weights in memory are discarded if this raises."""
        if not math.isfinite(norm):
            self._stop(f"gradient norm is {norm}", step, samples)

    def _stop(self, what: str, step: int, samples: tuple[int, ...]) -> None:
        raise TrainingDiverged(
            f"{what} at step {step + 1} (samples {samples[0]} to {samples[-1]}); the last checkpoint is intact: "
            "lower learning_rate, raise spike_factor, or look at the batch in bad_batch.json",
            step=step,
            samples=samples,
        )
