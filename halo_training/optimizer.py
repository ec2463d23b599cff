"""Megatron's AdamW with fp32 master weights and HALO's settings: betas (0.9, 0.95), clipping by global norm."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from halo_training.settings import TrainingSection

BETAS = (0.9, 0.95)


def build_optimizer(chunks: list[DistributedDataParallel], section: TrainingSection) -> MegatronOptimizer:
    """Optimizer of the trainable parameters of `chunks`. bf16 models get fp32 master weights.

    It is distributed (master weights and moments are sharded over data-parallel ranks) if the gradient buffers are.
    """
    dtype, buffers = chunks[0].config.params_dtype, chunks[0].ddp_config
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=section.learning_rate,
            weight_decay=section.weight_decay,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_eps=1e-8,
            clip_grad=section.clip_gradient,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=buffers.use_distributed_optimizer,
            overlap_param_gather=buffers.overlap_param_gather,
        ),
        chunks,
    )


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
