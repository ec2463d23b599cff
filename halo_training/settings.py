"""Settings of a training: the fields of a recipe's training sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingSection(Section):
    """One training stage: how long, on what windows, with which optimizer settings."""

    steps: PositiveInt
    context_length: PositiveInt
    global_batch: PositiveInt
    micro_batch: PositiveInt
    learning_rate: Annotated[float, Field(gt=0)]
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_gradient: Annotated[float, Field(gt=0)] = 1.0
    recall_share: Share = 0.0
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    keep_checkpoint_every: Annotated[int, Field(ge=0)] = 0
    watchdog_seconds: Annotated[float, Field(gt=0)] = 600.0
    spike_factor: Annotated[float, Field(gt=1)] = 20.0

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
