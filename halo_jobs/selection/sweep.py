"""The layer sweep: scores of every M(i), the teacher with layer i replaced by its aligned student mixer.

One model is loaded, the stage-1 model that has teacher and student side by side in every layer. The teacher runs once
per batch and its residual stream before each layer is kept; M(i) starts from the one before layer i, takes the student
there and the teacher above. A sweep over L layers so costs about L / 2 forward passes and one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halo_jobs.evaluation.interface import ScoreBatch, TokenScores
from halo_jobs.evaluation.megatron_scorer import score_hidden, to_device
from hypenet_kernels import chunked_kl_divergence
from hypenet_megatron.alignment import Route
from hypenet_megatron.model import HypeNetModel


@dataclass(frozen=True)
class LayerSwitch:
    """An aligned model of which any single layer can run its student."""

    model: HypeNetModel
    device: torch.device

    def _run(self, hidden: Tensor, first: int, rotary: Tensor) -> Iterator[Tensor]:
        """Residual stream after each layer from `first` on, then after the final norm."""
        decoder = self.model.decoder
        for layer in decoder.layers[first:]:
            hidden, _ = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
            yield hidden
        yield decoder.final_layernorm(hidden)

    def final_hidden(self, input_ids: Tensor) -> Iterator[Tensor]:
        """Final hidden states [s, b, d] of the teacher, then of M(0), M(1), ..., for token ids [b, s]."""
        self.model.eval()
        self.model.set_route(Route.TEACHER)
        rotary = self.model.rotary(input_ids.shape[1])
        before = [self.model.embed(input_ids)]
        *after, final = self._run(before[0], 0, rotary)
        before += after[:-1]
        yield final
        for layer, mixer in enumerate(self.model.aligned_mixers()):
            mixer.route = Route.STUDENT
            *_, final = self._run(before[layer], layer, rotary)
            mixer.route = Route.TEACHER
            yield final

    @torch.no_grad()
    def score(self, batch: ScoreBatch) -> list[TokenScores]:
        """Scores of the teacher, then of every M(i)."""
        return [
            score_hidden(self.model, hidden, batch)
            for hidden in self.final_hidden(to_device(batch, self.device))
        ]

    @torch.no_grad()
    def divergence(self, input_ids: Tensor) -> list[float]:
        """Mean KL(teacher || M(i)) in nats per token of `input_ids` [b, s], one per layer."""
        weight = self.model.head_weight().detach()
        teacher, *replaced = (hidden.flatten(0, 1) for hidden in self.final_hidden(input_ids))
        share = torch.full((teacher.shape[0],), 1.0 / teacher.shape[0], device=self.device)
        return [float(chunked_kl_divergence(hidden, weight, teacher, weight, share)) for hidden in replaced]
