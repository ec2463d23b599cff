"""Megatron's AdamW with fp32 master weights, as HALO sets it: betas (0.9, 0.95), clip by global norm."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from halo_jobs.recipe import TrainingSection

BETAS = (0.9, 0.95)


def build_optimizer(ddp: DistributedDataParallel, section: TrainingSection) -> MegatronOptimizer:
    """Optimizer over the trainable parameters of `ddp`; bf16 models get fp32 master weights."""
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=section.learning_rate,
            weight_decay=section.weight_decay,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_eps=1e-8,
            clip_grad=section.clip_gradient,
            bf16=ddp.config.params_dtype == torch.bfloat16,
            params_dtype=ddp.config.params_dtype,
            use_distributed_optimizer=False,
        ),
        [ddp],
    )


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
