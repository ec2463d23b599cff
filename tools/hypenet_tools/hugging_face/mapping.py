"""Hugging Face tensors <-> Megatron tensors: one table, read in both directions.

A row of the table names one Megatron tensor and the Hugging Face tensors its rows come from. With
`per_group` the parts are interleaved: for each key/value group first its rows of part one, then its rows of
part two, and so on, which is Megatron's fused [q | gate | k | v] layout. With `per_expert` the parts of expert 0
come first, then those of expert 1, and Megatron's tensor has the experts as an axis in front. Otherwise parts
are stacked. A row with one part is a plain copy. `tensor_parallel` says what a tensor-parallel rank has of it.

`conversion_plan` fills the table in for a model; each of its entries converts on its own, so callers may
stream.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hypenet_megatron.presets import MixerType, ModelShape

# Equal runs of rows; equal runs of columns; equal runs of the rows of each part (gate and up); all of it.
TensorParallel = Literal["rows", "columns", "rows of parts", "whole"]


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor and its shape in the symbols of `_sizes`."""

    name: str
    shape: str


@dataclass(frozen=True)
class Row:
    megatron: str
    parts: tuple[Part, ...]
    tensor_parallel: TensorParallel
    per_group: bool = False
    per_expert: bool = False


EMBEDDING = Row(
    "embedding.word_embeddings.weight", (Part("model.embed_tokens.weight", "vocab hidden"),), "rows"
)
FINAL_NORM = Row("decoder.final_layernorm.weight", (Part("model.norm.weight", "hidden"),), "whole")
UNTIED_HEAD = Row("output_layer.weight", (Part("lm_head.weight", "vocab hidden"),), "rows")

MEGATRON_LAYER, HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
EVERY_LAYER = (
    Row("input_layernorm.weight", (Part("input_layernorm.weight", "hidden"),), "whole"),
    Row("self_attention.q_layernorm.weight", (Part("self_attn.q_norm.weight", "head"),), "whole"),
    Row("self_attention.k_layernorm.weight", (Part("self_attn.k_norm.weight", "head"),), "whole"),
    Row("self_attention.linear_proj.weight", (Part("self_attn.o_proj.weight", "hidden queries"),), "columns"),
    Row("pre_mlp_layernorm.weight", (Part("post_attention_layernorm.weight", "hidden"),), "whole"),
)
DENSE_MLP = (
    Row(
        "mlp.linear_fc1.weight",
        (Part("mlp.gate_proj.weight", "ffn hidden"), Part("mlp.up_proj.weight", "ffn hidden")),
        "rows of parts",
    ),
    Row("mlp.linear_fc2.weight", (Part("mlp.down_proj.weight", "hidden ffn"),), "columns"),
)
EXPERTS_MLP = (
    Row("mlp.router.weight", (Part("mlp.gate.weight", "experts hidden"),), "whole"),
    Row(
        "mlp.experts.experts.linear_fc1.weight",
        (
            Part("mlp.experts.{expert}.gate_proj.weight", "expert_ffn hidden"),
            Part("mlp.experts.{expert}.up_proj.weight", "expert_ffn hidden"),
        ),
        "rows of parts",
        per_expert=True,
    ),
    Row(
        "mlp.experts.experts.linear_fc2.weight",
        (Part("mlp.experts.{expert}.down_proj.weight", "hidden expert_ffn"),),
        "columns",
        per_expert=True,
    ),
)

_QUERY = Part("self_attn.q_proj.weight", "queries hidden")
_KEY = Part("self_attn.k_proj.weight", "keys hidden")
_VALUE = Part("self_attn.v_proj.weight", "keys hidden")
_ATTENTION_GATE = Part("self_attn.o_gate.weight", "queries hidden")
_LIGHTNING_GATE = Part("self_attn.z_proj.weight", "queries hidden")
_QKV = "self_attention.linear_qkv.weight"
_OUTPUT_NORM = "self_attention.core_attention.o_norm.weight"

# (mixer type, has an output gate) -> rows that only such layers have
MIXERS: dict[tuple[MixerType, bool], tuple[Row, ...]] = {
    ("attn", False): (Row(_QKV, (_QUERY, _KEY, _VALUE), "rows", per_group=True),),
    ("attn", True): (Row(_QKV, (_QUERY, _ATTENTION_GATE, _KEY, _VALUE), "rows", per_group=True),),
    ("lightning", True): (
        Row(_QKV, (_QUERY, _LIGHTNING_GATE, _KEY, _VALUE), "rows", per_group=True),
        Row(
            _OUTPUT_NORM,
            (Part("self_attn.o_norm.weight", "queries"),),
            "rows",
        ),
    ),
}

_ROWS_BY_NAME = {
    row.megatron: row for row in (EMBEDDING, FINAL_NORM, UNTIED_HEAD, *EVERY_LAYER, *DENSE_MLP, *EXPERTS_MLP)
} | {row.megatron: row for rows in MIXERS.values() for row in rows}
_LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# In stage 1 teacher attention and student mixer stand side by side under names of their own.
_SIDE = re.compile(r"^self_attention\.(teacher|student)\.")


def row_of(megatron_name: str) -> tuple[int | None, Row]:
    """Layer (None outside the layers) and row of the table of a Megatron tensor; ValueError if there is none."""
    matched = _LAYER_KEY.fullmatch(megatron_name)
    layer, name = (int(matched[1]), matched[2]) if matched else (None, megatron_name)
    row = _ROWS_BY_NAME.get(_SIDE.sub("self_attention.", name))
    if row is None:
        raise ValueError(f"{megatron_name} is no tensor of a Qwen3 or HypeNet model")
    return layer, row


def key_value_groups(shape: ModelShape, mixer: MixerType) -> int:
    """Key/value heads of a layer: the teacher's in attention, one per query head in Lightning."""
    return shape.kv_groups if mixer == "attn" else shape.query_heads


def _sizes(shape: ModelShape, mixer: MixerType) -> dict[str, int]:
    return {
        "vocab": shape.vocab_size,
        "hidden": shape.hidden_size,
        "ffn": shape.ffn_hidden_size,
        "head": shape.head_dim,
        "queries": shape.query_heads * shape.head_dim,
        "keys": key_value_groups(shape, mixer) * shape.head_dim,
        "experts": shape.experts,
        "expert_ffn": shape.expert_ffn_size,
    }


@dataclass(frozen=True)
class PartRows:
    """Rows start:stop of a Hugging Face tensor, seen as a matrix."""

    part: str
    start: int
    stop: int


@dataclass(frozen=True)
class TensorPlan:
    """One Megatron tensor, its Hugging Face parts (name -> shape), and the groups they interleave in.

    `experts` is the length of the axis in front; None for a tensor without one.
    """

    megatron: str
    parts: dict[str, tuple[int, ...]]
    groups: int
    experts: int | None = None

    @property
    def megatron_shape(self) -> tuple[int, ...]:
        shapes = list(self.parts.values())
        rows = sum(shape[0] for shape in shapes)
        if self.experts is not None:
            return (self.experts, rows // self.experts, *shapes[0][1:])
        return (rows, *shapes[0][1:])

    def rows(self) -> Iterator[PartRows]:
        """Where the rows of the Megatron tensor (as a matrix) come from, in their order."""
        for group in range(self.groups):
            for name, shape in self.parts.items():
                size = shape[0] // self.groups
                yield PartRows(name, group * size, (group + 1) * size)

    def rows_of_parts(self) -> dict[str, list[tuple[int, int]]]:
        """The inverse: for each part, the runs (start, stop) of Megatron rows that make it up, in its order."""
        runs: dict[str, list[tuple[int, int]]] = {name: [] for name in self.parts}
        at = 0
        for rows in self.rows():
            runs[rows.part].append((at, at + rows.stop - rows.start))
            at = runs[rows.part][-1][1]
        return runs

    def fuse(self, tensors: Sequence[Tensor]) -> Tensor:
        """The Megatron tensor from its parts, in the order of `parts`."""
        for (name, shape), tensor in zip(self.parts.items(), tensors, strict=True):
            _require_shape(name, tensor, shape)
        if len(tensors) == 1:
            return tensors[0].view(self.megatron_shape)
        self.require_one_dtype([tensor.dtype for tensor in tensors])
        parts = dict(zip(self.parts, tensors, strict=True))
        return torch.cat([parts[rows.part][rows.start : rows.stop] for rows in self.rows()]).view(
            self.megatron_shape
        )

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts from the Megatron tensor; parts of a fused tensor are copies."""
        _require_shape(self.megatron, tensor, self.megatron_shape)
        if len(self.parts) == 1:
            return {name: tensor.view(shape) for name, shape in self.parts.items()}
        matrix = tensor.flatten(0, 1) if self.experts is not None else tensor
        return {
            name: torch.cat([matrix[start:stop] for start, stop in runs])
            for name, runs in self.rows_of_parts().items()
        }

    def require_one_dtype(self, dtypes: Sequence[torch.dtype]) -> None:
        """ValueError unless all parts, in the order of `parts`, have the same dtype."""
        if len(set(dtypes)) > 1:
            found = ", ".join(f"{name} {dtype}" for name, dtype in zip(self.parts, dtypes, strict=True))
            raise ValueError(
                f"{self.megatron} is made of tensors of different dtypes ({found}); save them in one dtype"
            )


def conversion_plan(
    shape: ModelShape, mixer_types: Sequence[MixerType], gated: bool
) -> tuple[TensorPlan, ...]:
    """The table filled in for a model: every tensor of either side exactly once."""
    if len(mixer_types) != shape.num_layers:
        raise ValueError(
            f"{shape.name} has {shape.num_layers} layers but {len(mixer_types)} mixer types were given"
        )
    plans = [_fill(EMBEDDING, shape)]
    for layer, mixer in enumerate(mixer_types):
        if (mixer, gated) not in MIXERS:
            known = sorted({name for name, has_gate in MIXERS if has_gate == gated})
            raise ValueError(
                f"layer {layer} is of mixer type {mixer!r}; with gated={gated} only {known} exist"
            )
        mlp = EXPERTS_MLP if shape.experts else DENSE_MLP
        plans += [_fill(row, shape, layer, mixer) for row in (*EVERY_LAYER, *mlp, *MIXERS[mixer, gated])]
    plans.append(_fill(FINAL_NORM, shape))
    if not shape.tied_embeddings:
        plans.append(_fill(UNTIED_HEAD, shape))
    names = [name for plan in plans for name in (plan.megatron, *plan.parts)]
    assert len(names) == len(set(names)), "the mapping table names a tensor twice"
    return tuple(plans)


def _fill(row: Row, shape: ModelShape, layer: int | None = None, mixer: MixerType = "attn") -> TensorPlan:
    sizes = _sizes(shape, mixer)
    of_layer = "" if layer is None else MEGATRON_LAYER.format(layer=layer)
    hf_of_layer = "" if layer is None else HF_LAYER.format(layer=layer)
    experts = shape.experts if row.per_expert else None
    parts = {
        hf_of_layer + part.name.format(expert=expert): tuple(sizes[symbol] for symbol in part.shape.split())
        for expert in range(experts or 1)
        for part in row.parts
    }
    groups = key_value_groups(shape, mixer) if row.per_group else 1
    return TensorPlan(of_layer + row.megatron, parts, groups, experts)


def hugging_face_shapes(plan: Iterable[TensorPlan]) -> dict[str, tuple[int, ...]]:
    return {name: shape for entry in plan for name, shape in entry.parts.items()}


def megatron_shapes(plan: Iterable[TensorPlan]) -> dict[str, tuple[int, ...]]:
    return {entry.megatron: entry.megatron_shape for entry in plan}


def mixers_of(
    megatron_shapes: Mapping[str, tuple[int, ...]], shape: ModelShape
) -> tuple[MixerType, ...] | None:
    """The mixers of the model that Megatron tensors of these shapes belong to; None for a teacher."""
    names = [MEGATRON_LAYER.format(layer=layer) + _QKV for layer in range(shape.num_layers)]
    if any(name not in megatron_shapes for name in names):
        raise ValueError(f"the tensors are not those of {shape.name} with {shape.num_layers} layers")
    if megatron_shapes[names[0]][0] == (shape.query_heads + 2 * shape.kv_groups) * shape.head_dim:
        return None
    norms = [MEGATRON_LAYER.format(layer=layer) + _OUTPUT_NORM for layer in range(shape.num_layers)]
    return tuple("lightning" if name in megatron_shapes else "attn" for name in norms)


def to_megatron(
    hf_tensors: Mapping[str, Tensor], shape: ModelShape, mixer_types: Sequence[MixerType], gated: bool
) -> dict[str, Tensor]:
    """Megatron tensors (tensor-parallel size 1) from Hugging Face tensors.

    `gated`: the hybrid, whose layers all have an output gate; False for the teacher. Tensors that are not
    fused are passed on, not copied. ValueError names tensors that are missing, surplus, or of another shape.
    """
    plan = conversion_plan(shape, mixer_types, gated)
    require_names(hf_tensors, hugging_face_shapes(plan), f"the Hugging Face weights of {shape.name}")
    return {entry.megatron: entry.fuse([hf_tensors[name] for name in entry.parts]) for entry in plan}


def to_hugging_face(
    megatron_tensors: Mapping[str, Tensor], shape: ModelShape, mixer_types: Sequence[MixerType], gated: bool
) -> dict[str, Tensor]:
    """The inverse of `to_megatron`, bit for bit."""
    plan = conversion_plan(shape, mixer_types, gated)
    require_names(megatron_tensors, megatron_shapes(plan), f"the Megatron weights of {shape.name}")
    return {
        name: part for entry in plan for name, part in entry.split(megatron_tensors[entry.megatron]).items()
    }


def require_names(found: Collection[str], expected: Collection[str], holder: str) -> None:
    """ValueError unless both name the same tensors."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        problems = [f"lack {_listing(missing)}"] if missing else []
        problems += [f"hold the unexpected {_listing(unexpected)}"] if unexpected else []
        raise ValueError(
            f"{holder} {' and '.join(problems)}; check that the weights, the model config and the list "
            "of attention layers belong together"
        )


def _listing(names: Sequence[str], shown: int = 4) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"tensor {name} has shape {list(tensor.shape)} where the model config calls for {list(shape)}; "
            "use the weights and the config of the same model"
        )
