"""Which rectangle of every tensor belongs to which rank of a tensor x pipeline x expert layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hypenet_megatron.mixers import mixer
from hypenet_megatron.presets import ModelShape
from hypenet_tools.hugging_face.mapping import table_entry
from sharded_tensors.rectangles import Rectangle, TensorInfo

_OPTIMIZER_STATE = re.compile(r"^optimizer\.state\.\w+\.")


class Rank(NamedTuple):
    tensor: int = 0
    pipeline: int = 0
    expert: int = 0


@dataclass(frozen=True)
class FolderLayout:
    """Sizes of the three groups over which weights are divided. Layers are divided evenly over pipeline stages."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    def require_divides(self, shape: ModelShape, mixer_types: Sequence[str]) -> None:
        """ValueError in one sentence when some tensor or the layers of `shape` cannot be divided so."""
        groups = min(mixer(name).kv_heads(shape) for name in mixer_types)
        rules = [
            ("--tp", self.tensor, "key/value heads", groups),
            ("--tp", self.tensor, "query heads", shape.query_heads),
            ("--tp", self.tensor, "vocabulary entries", shape.vocab_size),
            ("--tp", self.tensor, "feed-forward channels", shape.expert_ffn_size or shape.ffn_hidden_size),
            ("--pp", self.pipeline, "layers", shape.num_layers),
            ("--ep", self.expert, "experts", shape.experts or 1),
        ]
        for option, size, what, count in rules:
            if size < 1 or count % size:
                fitting = [n for n in range(1, min(count, 64) + 1) if count % n == 0]
                raise ValueError(
                    f"{option} {size} does not divide the {count} {what} of {shape.name}; "
                    f"choose one of {', '.join(map(str, fitting))}"
                )

    def rectangles(self, name: str, info: TensorInfo, num_layers: int) -> list[tuple[Rank, Rectangle]]:
        """The rectangles of a tensor with their ranks. A replicated tensor belongs to the first rank that has it.

        Optimizer state is divided like its weight.
        """
        weight = _OPTIMIZER_STATE.sub("", name)
        layer, entry = table_entry(weight)
        if layer is None:
            stage = 0 if weight.startswith("embedding.") else self.pipeline - 1
        else:
            stage = layer * self.pipeline // num_layers
        found = []
        for expert in range(self.expert if entry.per_expert else 1):
            box = Rectangle.covering(info)
            if entry.per_expert:
                box = box.divide(0, expert, self.expert)
            axis = 1 if entry.per_expert else 0  # of the rows that tensor parallelism divides
            ranks = 1 if entry.tensor_parallel == "whole" else self.tensor
            parts = len(entry.parts) if entry.tensor_parallel == "rows of parts" and ranks > 1 else 1
            if entry.tensor_parallel == "columns":
                axis = -1
            for rank in range(ranks):
                found += [
                    (Rank(rank, stage, expert), box.divide(axis, part * ranks + rank, parts * ranks))
                    for part in range(parts)
                ]
        return found
