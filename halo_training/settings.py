"""Settings of a training: the fields of a recipe's training sections.

A field of a section affects the results unless it is marked. Input hashes, and the check of what a checkpoint may be
resumed under, are made of the fields that affect results.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Mark(Enum):
    """Given in a field's annotation, such as `Annotated[PositiveInt, OPERATION]`."""

    OPERATION = "operation"
    """How a recipe is run, or which stages it has. No stage's result depends on it, but for rounding."""
    SOURCE = "source"
    """A path. Results depend on the files there, not on where they are."""


OPERATION, SOURCE = Mark.OPERATION, Mark.SOURCE


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def result_fields(cls) -> list[str]:
        """Names of the fields that results depend on."""
        return [
            name
            for name, field in cls.model_fields.items()
            if not any(isinstance(mark, Mark) for mark in field.metadata)
        ]

    def result_settings(self) -> dict[str, Any]:
        """The fields that results depend on, as JSON values."""
        return self.model_dump(mode="json", include=set(self.result_fields()))


class TrainingSection(Section):
    """One training stage: how long, on what windows, with which optimizer settings."""

    steps: PositiveInt
    context_length: PositiveInt
    global_batch: PositiveInt
    micro_batch: Annotated[PositiveInt, OPERATION]
    learning_rate: Annotated[float, Field(gt=0)]
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_gradient: Annotated[float, Field(gt=0)] = 1.0
    recall_share: Share = 0.0
    checkpoint_every: Annotated[PositiveInt, OPERATION] = 500
    keep_checkpoints: Annotated[PositiveInt, OPERATION] = 2
    keep_checkpoint_every: Annotated[int, Field(ge=0), OPERATION] = 0
    watchdog_seconds: Annotated[float, Field(gt=0), OPERATION] = 600.0
    spike_factor: Annotated[float, Field(gt=1), OPERATION] = 20.0

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainingSection:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.context_length
