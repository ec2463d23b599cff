"""The layer sweep: scores of every M(i), the teacher with layer i replaced by its aligned student mixer.

One model is loaded, the stage-1 model that has teacher and student side by side in every layer. The teacher runs once
per batch and its residual stream before each layer is kept; M(i) starts from the one before layer i, takes the student
there and the teacher above. A sweep over L layers so costs about L / 2 forward passes and one copy of the weights.
Several workers take groups of layers. A layer sees the same tensors in whatever group, so scores are the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from halo_evaluation.interface import ScoreBatch, TokenScores
from halo_evaluation.megatron_scorer import score_hidden, to_device
from hypenet_kernels import chunked_kl_divergence
from hypenet_megatron.alignment import Route
from hypenet_megatron.model import DecoderModel


@dataclass(frozen=True)
class LayerSwitch:
    """An aligned model of which any single layer can run its student."""

    model: DecoderModel
    device: torch.device

    def _run(self, hidden: Tensor, first: int, rotary: Tensor) -> Iterator[Tensor]:
        """Residual stream after each layer from `first` on, then after the final norm."""
        decoder = self.model.decoder
        for layer in decoder.layers[first:]:
            hidden, _ = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
            yield hidden
        yield decoder.final_layernorm(hidden)

    def final_hidden(
        self, input_ids: Tensor, layers: range | None = None, *, teacher: bool = True
    ) -> Iterator[Tensor]:
        """Final hidden states [s, b, d] of the teacher, if asked for, then of M(i) for each i of consecutive `layers`
        (None: all), for token ids [b, s]."""
        layers = range(len(self.model.aligned_mixers())) if layers is None else layers
        self.model.eval()
        self.model.set_route(Route.TEACHER)
        rotary = self.model.rotary(input_ids.shape[1])
        embedded = self.model.embed(input_ids)
        stream = chain([embedded], self._run(embedded, 0, rotary))
        before = list(islice(stream, layers.start, layers.stop))
        if teacher:
            yield _last(stream)
        for layer, hidden in zip(layers, before, strict=True):
            mixer = self.model.aligned_mixers()[layer]
            mixer.route = Route.STUDENT
            yield _last(self._run(hidden, layer, rotary))
            mixer.route = Route.TEACHER

    @torch.no_grad()
    def score(
        self, batch: ScoreBatch, layers: range | None = None, *, teacher: bool = True
    ) -> list[TokenScores]:
        """Scores of the models that `final_hidden` is of."""
        return [
            score_hidden(self.model, hidden, batch)
            for hidden in self.final_hidden(to_device(batch, self.device), layers, teacher=teacher)
        ]

    @torch.no_grad()
    def divergence(self, input_ids: Tensor, layers: range | None = None) -> list[float]:
        """Mean KL(teacher || M(i)) in nats per token of `input_ids` [b, s], one per layer."""
        weight = self.model.head_weight().detach()
        teacher, *replaced = (hidden.flatten(0, 1) for hidden in self.final_hidden(input_ids, layers))
        share = torch.full((teacher.shape[0],), 1.0 / teacher.shape[0], device=self.device)
        return [float(chunked_kl_divergence(hidden, weight, teacher, weight, share)) for hidden in replaced]


def _last(stream: Iterator[Tensor]) -> Tensor:
    """The end of a stream, holding no more than one of its tensors."""
    return deque(stream, maxlen=1)[0]


def layer_groups(num_layers: int, groups: int) -> list[range]:
    """`groups` runs of consecutive layers, none empty, about equally long to sweep: M(i) costs num_layers - i layers.

    Each group passes the layers below it once more, which all groups but the first so do in vain.
    """
    cost = [num_layers - layer for layer in range(num_layers)]
    found, start = [], 0
    for left in range(min(groups, num_layers), 0, -1):
        share, stop = sum(cost[start:]) / left, start + 1
        while stop <= num_layers - left and sum(cost[start : stop + 1]) - cost[stop] / 2 < share:
            stop += 1
        found.append(range(start, stop if left > 1 else num_layers))
        start = stop
    return found
