"""Hugging Face tensors <-> Megatron tensors: one table, read in both directions.

The table consists of `MegatronTensor`s: those of every model are listed here, those of a mixer in its spec
(`hypenet_megatron.mixers`). `conversion_plan` fills the table in for a model. Each of its entries converts on its own,
so that callers may stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hypenet_megatron.mixers import MIXERS, mixer
from hypenet_megatron.mixers.spec import HuggingFaceTensor, MegatronTensor, symbol_sizes
from hypenet_megatron.presets import ModelShape

EMBEDDING = MegatronTensor(
    "embedding.word_embeddings.weight", (HuggingFaceTensor("model.embed_tokens.weight", "vocab hidden"),), "rows"
)
FINAL_NORM = MegatronTensor(
    "decoder.final_layernorm.weight", (HuggingFaceTensor("model.norm.weight", "hidden"),), "whole"
)
UNTIED_HEAD = MegatronTensor("output_layer.weight", (HuggingFaceTensor("lm_head.weight", "vocab hidden"),), "rows")

MEGATRON_LAYER, HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
INPUT_NORM = MegatronTensor(
    "input_layernorm.weight", (HuggingFaceTensor("input_layernorm.weight", "hidden"),), "whole"
)
MLP_NORM = MegatronTensor(
    "pre_mlp_layernorm.weight", (HuggingFaceTensor("post_attention_layernorm.weight", "hidden"),), "whole"
)
DENSE_MLP = (
    MegatronTensor(
        "mlp.linear_fc1.weight",
        (
            HuggingFaceTensor("mlp.gate_proj.weight", "ffn hidden"),
            HuggingFaceTensor("mlp.up_proj.weight", "ffn hidden"),
        ),
        "rows of parts",
    ),
    MegatronTensor("mlp.linear_fc2.weight", (HuggingFaceTensor("mlp.down_proj.weight", "hidden ffn"),), "columns"),
)
EXPERTS_MLP = (
    MegatronTensor("mlp.router.weight", (HuggingFaceTensor("mlp.gate.weight", "experts hidden"),), "whole"),
    MegatronTensor(
        "mlp.experts.experts.linear_fc1.weight",
        (
            HuggingFaceTensor("mlp.experts.{expert}.gate_proj.weight", "expert_ffn hidden"),
            HuggingFaceTensor("mlp.experts.{expert}.up_proj.weight", "expert_ffn hidden"),
        ),
        "rows of parts",
        per_expert=True,
    ),
    MegatronTensor(
        "mlp.experts.experts.linear_fc2.weight",
        (HuggingFaceTensor("mlp.experts.{expert}.down_proj.weight", "hidden expert_ffn"),),
        "columns",
        per_expert=True,
    ),
)

MIXER = "self_attention."
# In stage 1 the teacher's attention and the student's mixer have names of their own.
_SIDE = re.compile(r"^self_attention\.(teacher|student)\.")
_LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_COMMON = {
    tensor.name: tensor
    for tensor in (EMBEDDING, FINAL_NORM, UNTIED_HEAD, INPUT_NORM, MLP_NORM, *DENSE_MLP, *EXPERTS_MLP)
}


def split_name(megatron_name: str) -> tuple[int | None, str]:
    """Layer (None outside the layers) and name within the layer."""
    matched = _LAYER_KEY.fullmatch(megatron_name)
    return (int(matched[1]), matched[2]) if matched else (None, megatron_name)


def table_entry(megatron_name: str) -> tuple[int | None, MegatronTensor]:
    """Layer (None outside the layers) and table entry of a Megatron tensor. ValueError if there is none.

    Mixers that have a tensor of the same name divide it in the same way; the entry is that of one of them.
    """
    layer, name = split_name(megatron_name)
    name = _SIDE.sub(MIXER, name)
    of_mixers = {tensor.name: tensor for spec in MIXERS.values() for tensor in spec.tensors}
    entry = _COMMON.get(name) or of_mixers.get(name)
    if entry is None:
        raise ValueError(f"{megatron_name} is not a tensor of a Qwen3 or HypeNet model")
    return layer, entry


@dataclass(frozen=True)
class TensorPlan:
    """A MegatronTensor of one layer of one model: its Hugging Face parts (name -> shape), and the groups they
    interleave in.

    `sources` are the entries of the table that `parts` come from, in the same order. `experts` is the length of the
    leading axis; None for a tensor without one.
    """

    megatron: str
    parts: dict[str, tuple[int, ...]]
    sources: tuple[HuggingFaceTensor, ...]
    groups: int
    experts: int | None = None

    @property
    def megatron_shape(self) -> tuple[int, ...]:
        shapes = list(self.parts.values())
        rows = sum(shape[0] for shape in shapes)
        if self.experts is not None:
            return (self.experts, rows // self.experts, *shapes[0][1:])
        return (rows, *shapes[0][1:])

    def rows(self) -> Iterator[tuple[str, int, int]]:
        """(part, start, stop): the rows of parts that make up the Megatron tensor (as matrices), in its order."""
        for group in range(self.groups):
            for name, shape in self.parts.items():
                size = shape[0] // self.groups
                yield name, group * size, (group + 1) * size

    def rows_of_parts(self) -> dict[str, list[tuple[int, int]]]:
        """The inverse: for each part, the runs (start, stop) of Megatron rows that make it up, in its order."""
        runs: dict[str, list[tuple[int, int]]] = {name: [] for name in self.parts}
        at = 0
        for part, start, stop in self.rows():
            runs[part].append((at, at + stop - start))
            at += stop - start
        return runs


def conversion_plan(shape: ModelShape, mixer_types: Sequence[str]) -> tuple[TensorPlan, ...]:
    """The table filled in for a model with these mixers: every tensor of either side exactly once."""
    if len(mixer_types) != shape.num_layers:
        raise ValueError(
            f"{shape.name} has {shape.num_layers} layers but {len(mixer_types)} mixer types were given"
        )
    mlp = EXPERTS_MLP if shape.experts else DENSE_MLP
    plans = [_fill(EMBEDDING, shape)]
    for layer, name in enumerate(mixer_types):
        spec = mixer(name)
        for tensor in (INPUT_NORM, *spec.tensors, MLP_NORM, *mlp):
            plans.append(_fill(tensor, shape, layer, spec.kv_heads(shape)))
    plans.append(_fill(FINAL_NORM, shape))
    if not shape.tied_embeddings:
        plans.append(_fill(UNTIED_HEAD, shape))
    names = [name for plan in plans for name in (plan.megatron, *plan.parts)]
    assert len(names) == len(set(names)), "the mapping table names a tensor twice"
    return tuple(plans)


def _fill(tensor: MegatronTensor, shape: ModelShape, layer: int | None = None, kv_heads: int = 0) -> TensorPlan:
    sizes = symbol_sizes(shape, kv_heads)
    of_layer = "" if layer is None else MEGATRON_LAYER.format(layer=layer)
    hf_of_layer = "" if layer is None else HF_LAYER.format(layer=layer)
    experts = shape.experts if tensor.per_expert else None
    filled = {
        hf_of_layer + part.name.format(expert=expert): part
        for expert in range(experts or 1)
        for part in tensor.parts
    }
    parts = {name: tuple(sizes[symbol] for symbol in part.shape.split()) for name, part in filled.items()}
    groups = kv_heads if tensor.per_group else 1
    return TensorPlan(of_layer + tensor.name, parts, tuple(filled.values()), groups, experts)


def hugging_face_shapes(plan: Iterable[TensorPlan]) -> dict[str, tuple[int, ...]]:
    return {name: shape for entry in plan for name, shape in entry.parts.items()}


def megatron_shapes(plan: Iterable[TensorPlan]) -> dict[str, tuple[int, ...]]:
    return {entry.megatron: entry.megatron_shape for entry in plan}
