"""The arithmetic of HypeNet that is worth a kernel, each op with its plain PyTorch reference beside it.

Imports only torch (and, on CUDA, triton).
"""

from hypenet_kernels.lightning import chunked_lightning_attention, decay_slopes, recurrent_lightning_attention
from hypenet_kernels.vocabulary_losses import chunked_cross_entropy, chunked_kl_divergence

__all__ = [
    "chunked_cross_entropy",
    "chunked_kl_divergence",
    "chunked_lightning_attention",
    "decay_slopes",
    "recurrent_lightning_attention",
]
