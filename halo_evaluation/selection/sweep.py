"""The layer sweep: scores of every M(i), the teacher with layer i replaced by its aligned student mixer.

It loads the aligned model, which has a teacher and a student mixer in every layer. The teacher runs once per batch, and
its residual stream before each layer is kept. M(i) continues from the stream before layer i, with the student in that
layer and the teacher above. A sweep over L layers costs about L / 2 forward passes and one copy of the weights. Workers
take groups of layers. The inputs of a layer do not depend on its group, so scores are the same bit for bit.
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
    """An aligned model in which any single layer can run its student mixer."""

    model: DecoderModel
    device: torch.device

    def _run(self, hidden: Tensor, first: int, rotary: Tensor) -> Iterator[Tensor]:
        """Residual stream after each layer from `first` on, and after the final norm."""
        decoder = self.model.decoder
        for layer in decoder.layers[first:]:
            hidden, _ = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
            yield hidden
        yield decoder.final_layernorm(hidden)

    def final_hidden(
        self, input_ids: Tensor, layers: range | None = None, *, teacher: bool = True
    ) -> Iterator[Tensor]:
        """Final hidden states [s, b, d] for token ids [b, s]: of the teacher, if `teacher`, then of M(i) for every i in
        the consecutive `layers` (None: all)."""
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
        """Scores of the models of `final_hidden`, in the same order."""
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
    """The last tensor of a stream. Keeps only one of them in memory."""
    return deque(stream, maxlen=1)[0]


def layer_groups(num_layers: int, groups: int) -> list[range]:
    """At most `groups` non-empty groups of consecutive layers of about equal cost: M(i) runs num_layers - i layers.

    Every group also runs the layers below its first one, which is not counted.
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
