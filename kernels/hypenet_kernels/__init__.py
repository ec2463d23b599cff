"""HypeNet's kernels: Lightning Attention, the norms around it, vocabulary losses; each with a PyTorch reference.

CUDA tensors run Triton kernels, other tensors run PyTorch. Imports only torch and, on CUDA, triton.
"""

from hypenet_kernels.decode import lightning_decode, lightning_decode_deferred
from hypenet_kernels.lightning import chunked_lightning_attention, decay_slopes
from hypenet_kernels.lightning_ops import lightning_attention
from hypenet_kernels.output_norm import gated_norm, heads_sum_of_squares
from hypenet_kernels.query_key_norm import norm_rope
from hypenet_kernels.vocabulary_losses import chunked_cross_entropy, chunked_kl_divergence

__all__ = [
    "chunked_cross_entropy",
    "chunked_kl_divergence",
    "chunked_lightning_attention",
    "decay_slopes",
    "gated_norm",
    "heads_sum_of_squares",
    "lightning_attention",
    "lightning_decode",
    "lightning_decode_deferred",
    "norm_rope",
]
