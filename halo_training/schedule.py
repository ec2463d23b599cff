"""The learning rate as a pure function of the step, without state to save or restore."""

from __future__ import annotations

import math

from halo_training.settings import TrainingSection


def learning_rate(section: TrainingSection, step: int) -> float:
    """Rate of 0-based `step`: linear warm-up, then constant or a cosine to `final_learning_rate`."""
    warmup = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    if section.schedule == "constant":
        return section.learning_rate * warmup
    progress = max(0, step - section.warmup_steps) / max(1, section.steps - section.warmup_steps)
    span = section.learning_rate - section.final_learning_rate
    return warmup * (
        section.final_learning_rate + 0.5 * span * (1.0 + math.cos(math.pi * min(1.0, progress)))
    )
