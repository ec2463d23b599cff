"""Builds the models of the stages: teacher, teacher with a student mixer in every layer, hybrid."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from durable_files import read_json, write_json
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel, LocalModel, build_model, model_chunks
from hypenet_megatron.presets import ModelShape
from hypenet_megatron.runtime import ONE_PROCESS, ParallelLayout
from hypenet_tools.hugging_face.initialise import hybrid_of
from hypenet_tools.model_weights import load_weights, read_weights
from sharded_tensors.megatron import model_pieces

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE_FILE = "shape.json"


def write_shape(folder: Path, shape: ModelShape) -> Path:
    write_json(folder / SHAPE_FILE, asdict(shape))
    return folder / SHAPE_FILE


def read_shape(folder: Path) -> ModelShape:
    return ModelShape(**read_json(folder / SHAPE_FILE))


def is_student_key(key: str) -> bool:
    return ".self_attention.student." in key


def _teacher_key(key: str) -> str:
    """The name in the teacher's weights of an aligned model's tensor; "" for a student's tensor."""
    return "" if is_student_key(key) else key.replace(".self_attention.teacher.", ".self_attention.")


def _student_key(key: str) -> str:
    return key if is_student_key(key) else ""


def single_part(model: LocalModel) -> DecoderModel:
    """`model` as one DecoderModel, which it is in stages without parallelism, such as select and evaluate."""
    assert isinstance(model, DecoderModel)
    return model


@torch.no_grad()
def _initialise(model: LocalModel, seed: int) -> None:
    """Draw every matrix with Megatron's initialisers, seeded from (seed, name) only.

    Megatron draws matrices in the order in which it builds modules, so its values would depend on the layout.
    """
    config = model_chunks(model)[0].config
    for piece in model_pieces(model):
        if len(piece.global_shape) < 2:
            continue  # norms are ones
        into_the_stream = "linear_proj" in piece.key or "linear_fc2" in piece.key
        whole = torch.empty(piece.global_shape)
        digest = hashlib.sha256(f"initial {seed} {piece.key}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            (config.output_layer_init_method if into_the_stream else config.init_method)(whole)
        piece.data.copy_(whole[piece.global_slice()])


@dataclass(frozen=True)
class ModelBuilder:
    """Builds this rank's part of a run's models, in one dtype on one device."""

    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    layout: ParallelLayout = ONE_PROCESS
    transformer_impl: str = "local"
    student: str | None = None
    """The student mixer of aligned models and hybrids; None if only teachers are built."""

    def _build(self, mixers: Sequence[str], *, beside: str | None = None, base: float | None = None) -> LocalModel:
        """Build a model without loading weights. `beside` is the aligned student mixer, `base` of logits scaling."""
        config = DecoderConfig.from_shape(
            self.shape,
            mixers,
            dtype=self.dtype,
            logits_scaling_base=base,
            transformer_impl=self.transformer_impl,
            **self.layout.megatron_options(),
        )
        return build_model(config, student=beside).to(self.device)

    def fresh_teacher(self, seed: int) -> LocalModel:
        """A randomly initialised Qwen3 model for pretraining, with the same weights in every layout."""
        model = self._build(self.shape.teacher_mixers())
        _initialise(model, seed)
        return model

    def teacher(self, weights: Path) -> LocalModel:
        model = self._build(self.shape.teacher_mixers())
        load_weights(weights, model)
        return model

    def aligned(self, teacher_weights: Path, student_weights: Path) -> LocalModel:
        """A teacher with a student mixer in every layer, from the two weights folders."""
        model = self._build(self.shape.teacher_mixers(), beside=self.student)
        load_weights(teacher_weights, model, rename=_teacher_key)
        load_weights(student_weights, model, rename=_student_key)
        return model

    def _mixers(self, attention_layers: Collection[int]) -> tuple[str, ...]:
        assert self.student is not None
        return self.shape.hybrid_mixers(attention_layers, self.student)

    def hybrid(
        self, weights: Path, attention_layers: Collection[int], logits_scaling_base: float | None = None
    ) -> LocalModel:
        model = self._build(self._mixers(attention_layers), base=logits_scaling_base)
        load_weights(weights, model)
        return model

    def hybrid_from_parts(
        self, teacher_weights: Path, student_weights: Path, attention_layers: Collection[int], seed: int
    ) -> LocalModel:
        """The hybrid that distillation starts from: the teacher with aligned students, gates drawn from `seed`."""
        mixers = self._mixers(attention_layers)
        model = self._build(mixers)
        teacher, students = read_weights(teacher_weights), read_weights(student_weights)
        load_weights(hybrid_of(teacher, students, self.shape, mixers, seed), model)
        return model
