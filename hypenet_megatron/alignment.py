"""HALO stage 1 in one layer: the teacher's attention and the student's mixer run on the same normalised input."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from hypenet_megatron.config import DecoderConfig


class Route(Enum):
    """What an AlignedSelfAttention computes from its input."""

    TEACHER = "teacher"  # the teacher's attention alone
    STUDENT = "student"  # the student's mixer alone: layer i of M(i) in the selection sweep
    ALIGN = "align"  # both; returns the teacher's output and keeps the student's distance to it


class AlignedSelfAttention(MegatronModule):
    """Drop-in `self_attention`: the frozen softmax attention of the teacher beside the mixer `student`.

    On the ALIGN route, `loss` holds the mean squared difference of the two outputs over this rank's tokens and all
    channels: an fp32 scalar whose gradient reaches only the student. The residual stream stays the teacher's.
    """

    def __init__(
        self,
        config: DecoderConfig,
        submodules: dict[str, ModuleSpec],
        layer_number: int,
        student: str,
        **options: Any,
    ) -> None:
        super().__init__(config)
        options = {**options, "layer_number": layer_number}
        self.teacher = build_module(submodules["teacher"], config=config, **options)
        self.student = build_module(submodules["student"], config=config.for_mixer(student), **options)
        self.teacher.requires_grad_(False)
        self.route = Route.TEACHER
        self.loss: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Map the layer's normalised input [s, b, d] to (mixer output [s, b, d], bias None)."""
        if self.route is Route.STUDENT:
            return self.student(hidden_states, *args, **options)
        with torch.no_grad():
            target, bias = self.teacher(hidden_states, *args, **options)
        if self.route is Route.ALIGN:
            with torch.enable_grad():
                output, _ = self.student(hidden_states.detach(), *args, **options)
                # F.mse_loss would save `target`, which Megatron's residual sum overwrites in eval mode.
                self.loss = (output.float() - target.float()).square().mean()
        return target, bias
