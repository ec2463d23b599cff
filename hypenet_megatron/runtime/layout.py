"""How the processes of a world share one model, and whether a layout fits a model and a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hypenet_megatron.mixers import MixerSpec
from hypenet_megatron.presets import ModelShape

Recompute = Literal["attention", "layers"]

_RECOMPUTE: dict[str | None, dict[str, Any]] = {
    None: {},
    "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "layers": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


@dataclass(frozen=True)
class ParallelLayout:
    """How many ranks share each layer (tensor), the stack of layers (pipeline) and the sequence (context). The other
    ranks hold data-parallel copies.

    `virtual_pipeline` is the number of model chunks per pipeline rank (interleaved schedule). Stages have equal numbers
    of layers unless `first_stage_layers`, `last_stage_layers` or `pipeline_layout` is set. The last is in Megatron's
    notation, such as "Et|tt|tL": E embedding, t layer, L head. `distributed_optimizer` shards master weights and
    moments over data-parallel ranks; `overlap` overlaps its collectives with computation. `recompute` saves memory: the
    backward pass recomputes activations of the softmax cores ("attention") or of entire layers ("layers").
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence_parallel: bool = False
    virtual_pipeline: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    pipeline_layout: str | None = None
    distributed_optimizer: bool = False
    overlap: bool = False
    recompute: Recompute | None = None

    @property
    def model_ranks(self) -> int:
        """Number of processes that share one copy of the model."""
        return self.tensor * self.pipeline * self.context

    def data_ranks(self, processes: int) -> int:
        """Number of data-parallel copies in a world of `processes`. ValueError unless it is a whole number."""
        if processes % self.model_ranks:
            raise ValueError(
                f"{processes} processes cannot be shared out: tensor {self.tensor} x pipeline {self.pipeline} x "
                f"context {self.context} takes {self.model_ranks} per copy of the model; use a multiple of that"
            )
        return processes // self.model_ranks

    def megatron_options(self) -> dict[str, Any]:
        """The fields of Megatron's TransformerConfig that this layout sets."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "context_parallel_size": self.context,
            "sequence_parallel": self.sequence_parallel,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline
            if self.virtual_pipeline > 1
            else None,
            "num_layers_in_first_pipeline_stage": self.first_stage_layers,
            "num_layers_in_last_pipeline_stage": self.last_stage_layers,
            "pipeline_model_parallel_layout": self.pipeline_layout,
            **_RECOMPUTE[self.recompute],
        }

    def check_model(self, shape: ModelShape) -> None:
        """Raise ValueError if this layout cannot split a model of `shape`."""
        for what, size in (
            ("query heads", shape.query_heads),
            ("kv groups", shape.kv_groups),
            ("feed-forward channels", shape.ffn_hidden_size),
            ("vocabulary entries", shape.vocab_size),
        ):
            if size % self.tensor:
                raise ValueError(
                    f"tensor {self.tensor} does not divide the {size} {what} of {shape.name}; choose a divisor"
                )
        if shape.query_heads % (self.tensor * self.context):
            raise ValueError(
                f"context {self.context} does not divide the {shape.query_heads // self.tensor} query heads of "
                f"{shape.name} on each tensor rank; choose a divisor"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel splits what tensor ranks share; set tensor to at least 2")
        if self.overlap and not self.distributed_optimizer:
            raise ValueError("overlap is for the distributed optimizer; set distributed_optimizer: true")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("virtual_pipeline interleaves pipeline stages; set pipeline to at least 2")
        self._check_stages(shape)

    def check_mixer(self, spec: MixerSpec) -> None:
        """Raise ValueError if `context` splits the sequence and the mixer does not support that."""
        if self.context > 1 and spec.context_parallel is None:
            raise ValueError(
                f"mixer {spec.name} does not support context parallelism; set layout.context to 1"
            )

    def _check_stages(self, shape: ModelShape) -> None:
        if self.pipeline_layout is not None:
            self._check_pipeline_layout(self.pipeline_layout, shape)
            return
        named = [layers for layers in (self.first_stage_layers, self.last_stage_layers) if layers is not None]
        rest, stages = shape.num_layers - sum(named), self.pipeline - len(named)
        if stages < 0 or rest < stages or (stages == 0 and rest > 0) or (stages > 0 and rest % stages):
            raise ValueError(
                f"{shape.num_layers} layers cannot be spread over {self.pipeline} pipeline stages"
                + (f" of which {len(named)} have {' and '.join(map(str, named))}" if named else "")
                + "; choose a divisor, or say first_stage_layers, last_stage_layers or pipeline_layout"
            )
        for layers in [*named, *([rest // stages] if stages else [])]:
            if layers % self.virtual_pipeline:
                raise ValueError(
                    f"a pipeline stage of {layers} layers cannot be cut into {self.virtual_pipeline} chunks; change "
                    "virtual_pipeline or the layers of the stage"
                )

    def _check_pipeline_layout(self, written: str, shape: ModelShape) -> None:
        from megatron.core.transformer.enums import LayerType
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

        if self.first_stage_layers is not None or self.last_stage_layers is not None:
            raise ValueError(
                f"pipeline_layout {written!r} already says what each stage holds; leave out first_stage_layers and "
                "last_stage_layers"
            )
        try:
            chunks = PipelineParallelLayerLayout.parse_str_to_list(written)
        except AssertionError as problem:
            raise ValueError(f"pipeline_layout {written!r} is not Megatron's notation: {problem}") from None
        if len(chunks) != self.pipeline * self.virtual_pipeline:
            raise ValueError(
                f"pipeline_layout {written!r} names {len(chunks)} chunks, pipeline {self.pipeline} x virtual_pipeline "
                f"{self.virtual_pipeline} makes {self.pipeline * self.virtual_pipeline}; separate them by '|'"
            )
        kinds = [kind for chunk in chunks for kind in chunk]
        wanted = [LayerType.embedding, *[LayerType.decoder] * shape.num_layers, LayerType.loss]
        if kinds != wanted or any(LayerType.decoder not in chunk for chunk in chunks):
            raise ValueError(
                f"pipeline_layout {written!r} should begin with E, end with L and have the {shape.num_layers} layers "
                f"of {shape.name} between them as t, at least one in every chunk"
            )

    def check_batch(self, context_length: int, global_batch: int, micro_batch: int, processes: int) -> None:
        """Raise ValueError if this layout cannot split windows and batches of these sizes."""
        if context_length % (self.context * (self.tensor if self.sequence_parallel else 1)):
            raise ValueError(
                f"context_length {context_length} cannot be cut into {self.context} context-parallel"
                + (f" x {self.tensor} sequence-parallel" if self.sequence_parallel else "")
                + " equal slices; change one of them"
            )
        data_ranks = self.data_ranks(processes)
        if global_batch % (micro_batch * data_ranks):
            raise ValueError(
                f"global_batch {global_batch} is not a multiple of micro_batch {micro_batch} times {data_ranks} "
                "data-parallel ranks; change one of them"
            )
        micro_batches = global_batch // (micro_batch * data_ranks)
        if self.virtual_pipeline > 1 and micro_batches % self.pipeline:
            raise ValueError(
                f"virtual_pipeline needs the {micro_batches} micro-batches of a data-parallel rank to be a multiple of "
                f"pipeline {self.pipeline}; change global_batch or micro_batch"
            )


ONE_PROCESS = ParallelLayout()
