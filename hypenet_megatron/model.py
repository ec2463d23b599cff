"""The decoder: embedding, Megatron's TransformerBlock with this project's layer specs, output head.

A thin LanguageModule replaces GPTModel, which is deprecated and computes full logits. Here `forward` ends at the final
hidden states, because every loss computes logits from them in chunks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from hypenet_megatron.alignment import AlignedSelfAttention, Route
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.context_parallel import sequence_slice
from hypenet_megatron.layer_specs import block_spec
from hypenet_megatron.norms import weight_in_use


class DecoderModel(LanguageModule):
    """A teacher, a hybrid, or (with `student`) a teacher with the mixer `student` beside each attention.

    `forward` maps token ids [b, s] to hidden states [s, b, d]: after the final norm on the last pipeline stage, the
    residual stream on the others. With context parallelism, s is the length of this rank's slice.
    """

    def __init__(self, config: DecoderConfig, *, student: str | None = None, vp_stage: int | None = None) -> None:
        super().__init__(config=config)
        self.vp_stage = vp_stage
        self.student = student
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.share_embeddings_and_output_weights = config.tied_embeddings
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=config.vocab_size,
                max_sequence_length=config.max_positions,
                position_embedding_type="rope",
                tp_group=self.pg_collection.tp,
            )
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=config.rope_theta,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
        )
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(config, pp_rank=self.pg_collection.pp.rank(), vp_stage=vp_stage, student=student),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if self.post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                config.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and config.tied_embeddings,
                tp_group=self.pg_collection.tp,
            )
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Receive hidden states from the previous pipeline stage. Megatron's schedules call this."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Map token ids [b, s] to the residual stream before layer 0, [s, b, d]."""
        return self.embedding(input_ids=input_ids, position_ids=None)

    def rotary(self, sequence_length: int) -> Tensor:
        """RoPE angles [s / cp, 1, 1, dh] in fp32 for this rank's slice of a sequence of `sequence_length` tokens."""
        # RotaryEmbedding.forward would take zig-zag slices.
        return sequence_slice(self.rotary_pos_emb.get_emb(sequence_length), 0, self.cp_group)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids) if self.pre_process else None
        sequence_length = input_ids.shape[1] * self.pg_collection.cp.size()
        return self.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=self.rotary(sequence_length)
        )

    def head_weight(self) -> Tensor:
        """The output head [vocab / tp, d]; with tied embeddings, the embedding."""
        # If the embedding is on an earlier stage, the output layer holds a copy of the tied weight.
        is_here = self.share_embeddings_and_output_weights and self.pre_process
        return weight_in_use(self.embedding.word_embeddings if is_here else self.output_layer)

    def head_input(self, hidden: Tensor) -> Tensor:
        """Final hidden states of the whole sequence. Gathers them if sequence parallelism splits them."""
        if self.config.sequence_parallel:
            # The chunked losses already sum the hidden gradient over vocabulary slices, so it is not reduced again.
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Map final hidden states [..., d] to this rank's logits [..., vocab / tp]."""
        return hidden @ self.head_weight().t()

    def aligned_mixers(self) -> list[AlignedSelfAttention]:
        """The teacher/student pairs of this pipeline stage in layer order. Only aligned models have them."""
        return [layer.self_attention for layer in self.decoder.layers]

    def set_route(self, route: Route) -> None:
        for mixer in self.aligned_mixers():
            mixer.route = route

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}output_layer._extra_state", None)  # empty, and absent without Transformer Engine
        return state


class ModelChunks(torch.nn.ModuleList):
    """The model chunks of a pipeline rank in the interleaved schedule, in layer order; each is a DecoderModel.

    Parameter names begin with the chunk's number. Checkpoint keys do not.
    """

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {
            f"{prefix}{number}.{name}": entry
            for number, chunk in enumerate(model_chunks(self))
            for name, entry in chunk.sharded_state_dict("", sharded_offsets, metadata).items()
        }


LocalModel = DecoderModel | ModelChunks
"""The part of a model that this rank holds."""


def build_model(config: DecoderConfig, *, student: str | None = None) -> LocalModel:
    """Build this rank's part of the model: one DecoderModel, or one per chunk with a virtual pipeline."""
    chunks = config.virtual_pipeline_model_parallel_size
    if chunks is None:
        return DecoderModel(config, student=student)
    return ModelChunks(DecoderModel(config, student=student, vp_stage=stage) for stage in range(chunks))


def model_chunks(model: LocalModel) -> list[DecoderModel]:
    """The DecoderModels that this rank's part `model` consists of, in layer order."""
    return [model] if isinstance(model, DecoderModel) else cast("list[DecoderModel]", list(model))
