"""Calls that compile the kernels of a model before its first training step or its first token.

Each function yields (what, call) pairs; a call runs a kernel once, on zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hypenet_kernels.decode import WINDOW, lightning_decode, lightning_decode_deferred
from hypenet_kernels.lightning import decay_slopes
from hypenet_kernels.lightning_ops import lightning_attention
from hypenet_kernels.output_norm import gated_norm, heads_sum_of_squares
from hypenet_kernels.query_key_norm import norm_rope
from hypenet_kernels.vocabulary_losses import chunked_cross_entropy, chunked_kl_divergence

Calls = Iterator[tuple[str, Callable[[], None]]]

TOKENS = 256
VOCABULARY = 512  # the kernels of the losses are the same for every vocabulary
EPSILON = 1e-6


def _train(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    function(*inputs).float().sum().backward()


def lightning_calls(heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Calls:
    """The kernels of a Lightning Attention layer with `heads` heads on a rank."""

    def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=of, device=device, requires_grad=True)

    slopes, scale = decay_slopes(heads), head_dim**-0.5
    fused = zeros(1, TOKENS, heads, 4, head_dim)
    angles = torch.zeros(TOKENS, head_dim // 2, device=device)

    def attention(fused: Tensor, *state: Tensor) -> Tensor:
        q, k, v, _ = fused.unbind(3)
        initial = state[0] if state else None
        o, final = lightning_attention(
            q, k, v, slopes, scale, initial_state=initial, output_final_state=bool(state)
        )
        return o if final is None else o.float().sum() + final.sum()

    def normed(fused: Tensor, weight: Tensor) -> Tensor:
        query, _, key, _ = fused.unbind(3)
        return torch.cat(norm_rope(query, key, weight, weight, angles.cos(), angles.sin(), EPSILON))

    def gated(fused: Tensor, o: Tensor, weight: Tensor, *, over_ranks: bool = False) -> Tensor:
        return gated_norm(o, fused.unbind(3)[1], weight, EPSILON, heads_sum_of_squares(o) if over_ranks else None)

    weights = zeros(heads * head_dim)
    o = zeros(1, TOKENS, heads, head_dim)
    state = zeros(1, heads, head_dim, head_dim, of=torch.float32)
    yield "Lightning Attention", partial(_train, attention, fused)
    yield "Lightning Attention with states", partial(_train, attention, fused, state)
    yield "q/k norm and RoPE", partial(_train, normed, fused, zeros(head_dim))
    yield "output norm and gate", partial(_train, gated, fused, o, weights)
    yield "output norm over ranks", partial(_train, partial(gated, over_ranks=True), fused, o, weights)
    for batch in (1, 64):  # few states and many are cut differently
        yield f"decoding, batch {batch}", partial(_decode, batch, heads, head_dim, dtype, device)


def loss_calls(hidden_size: int, dtype: torch.dtype, device: torch.device) -> Calls:
    """The kernels of the losses over hidden states of `hidden_size` channels."""
    hidden, head = (
        torch.zeros(rows, hidden_size, dtype=dtype, device=device, requires_grad=True)
        for rows in (TOKENS, VOCABULARY)
    )
    share = torch.ones(TOKENS, device=device)
    labels = torch.zeros(TOKENS, dtype=torch.int64, device=device)
    yield (
        "cross entropy",
        partial(_train, lambda x, w: chunked_cross_entropy(x, w, labels, share), hidden, head),
    )
    yield "KL divergence", partial(_train, lambda x, w: chunked_kl_divergence(x, w, x, w, share), hidden, head)


def _decode(batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    slopes, scale = decay_slopes(heads), head_dim**-0.5
    q, k, v, out = torch.zeros(4, batch, heads, head_dim, dtype=dtype, device=device)
    state = torch.zeros(batch, heads, head_dim, head_dim, device=device)
    keys, values = torch.zeros(2, batch, heads, WINDOW, head_dim, dtype=dtype, device=device)
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    pending = torch.zeros_like(slots)
    lightning_decode(q, k, v, state, slots, slopes, scale, out)
    lightning_decode_deferred(q, k, v, state, keys, values, slots, pending, slopes, scale, out)
