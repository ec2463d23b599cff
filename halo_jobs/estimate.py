"""Estimates parameters, memory and time of a recipe's training stages, to within a factor of two.

Training takes 2 operations per weight and token forward and 4 backward. A short matrix product measures the machine's
speed; training attains ATTAINED_SHARE of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from halo_jobs.recipe import ConversionRecipe, Recipe, TrainingSection
from halo_training.models import DTYPES
from hypenet_megatron.mixers import mixer
from hypenet_megatron.presets import ModelShape

ATTAINED_SHARE = {"cpu": 0.35, "cuda": 0.12}
_PRODUCT_SIZE = {"cpu": 768, "cuda": 8192}
_LIVE_ACTIVATIONS_PER_LAYER = 34  # per token, in units of the hidden size, kept for the backward pass


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage. `memory_bytes` covers weights, optimizer and activations; `tokens` are those trained on."""

    stage: str
    trainable: int
    parameters: int
    memory_bytes: int
    tokens: int
    seconds: float


def model_parameters(shape: ModelShape, mixers: Sequence[str]) -> int:
    """Number of parameters of a model with these mixers, one per layer."""
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    mlp = 3 * shape.hidden_size * shape.ffn_hidden_size + 2 * shape.hidden_size
    of_mixers = sum(mixer(name).parameters(shape) for name in mixers)
    return embeddings + shape.num_layers * mlp + of_mixers + shape.hidden_size


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure floating-point operations per second in a square matrix product. A multiply-add counts as two."""
    size = _PRODUCT_SIZE[device.type]
    a = torch.randn(size, size, device=device, dtype=dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2.0 * size**3 / timer.timeit(5).mean


def training_costs(recipe: Recipe, shape: ModelShape, device: torch.device) -> list[StageCost]:
    """One entry per training stage, including distill and finetune of every baseline."""
    dtype = DTYPES[recipe.precision]
    weight_bytes = dtype.itemsize
    flops_per_second = measured_flops(device, dtype) * ATTAINED_SHARE[device.type]

    def cost(stage: str, section: TrainingSection, teacher: int, trainable: int) -> StageCost:
        """`teacher` is the number of parameters that run forward only; `trainable` ones also have optimizer state."""
        tokens = section.steps * section.tokens_per_step
        # weights, fp32 gradient, fp32 master weights, two moments
        optimizer = trainable * (weight_bytes + 4 + 4 + 8)
        activations = section.micro_batch * section.context_length * shape.num_layers * shape.hidden_size
        memory = teacher * weight_bytes + optimizer + activations * _LIVE_ACTIVATIONS_PER_LAYER * weight_bytes
        seconds = tokens * (2 * teacher + 6 * trainable) / flops_per_second
        return StageCost(stage, trainable, teacher + trainable, memory, tokens, seconds)

    teacher = model_parameters(shape, shape.teacher_mixers())
    if not isinstance(recipe, ConversionRecipe):
        return [cost("pretrain", recipe.pretrain, 0, teacher)]
    students = shape.num_layers * mixer(recipe.student).parameters(shape)
    hybrid = model_parameters(shape, shape.hybrid_mixers(range(shape.num_layers // 4), recipe.student))
    rows = [cost("align", recipe.align, teacher, students)]
    for variant in ("hybrid", *recipe.select.baselines):
        rows.append(cost(f"distill.{variant}", recipe.distill, teacher, hybrid))
        rows.append(cost(f"finetune.{variant}", recipe.finetune, 0, hybrid))
    return rows
