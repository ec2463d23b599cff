"""Lightning Attention in PyTorch: linear attention with one fixed decay per head.

    S_t = gamma_h S_{t-1} + k_t^T v_t,   o_t = scale * q_t S_t,   gamma_h = exp(-slope_h)

Shapes throughout: q, k, v, o [batch, time, heads, head_dim]; state [batch, heads, head_dim (of k), head_dim (of v)],
fp32 (fp64 for fp64 inputs). Sources: HypeNet (arXiv 2601.22156) and Lightning Attention-2 (arXiv 2401.04658).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypenet_kernels.arguments import reference_dtype

CHUNK = 64
# q and k absorb the decay as gamma^(+-CHUNK/2). With slope <= 1 this is at most e^32, which bf16 and fp32 can hold.
CHUNKS_PER_SEGMENT = 64


def decay_slopes(num_heads: int) -> list[float]:
    """Decay rate of every head, fastest first: 2^(-8 h / H), h = 1..H.

    If H is not a power of two, let P be the largest power of two below H. The P slopes for P heads come first, then
    every second slope (indices 0, 2, 4, ...) of those for 2P heads, until there are H. Source: ALiBi, arXiv 2108.12409.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * head / power) for head in range(1, power + 1)]
    doubled = [2.0 ** (-8.0 * head / (2 * power)) for head in range(1, 2 * power + 1)]
    return slopes + doubled[0::2][: num_heads - power]


def _chunk_weights(slopes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gamma^(i - m) for q and gamma^(m - i) for k at position i of a chunk with middle m: each [heads, 1, CHUNK, 1]."""
    offset = torch.arange(CHUNK, device=slopes.device, dtype=dtype) - CHUNK // 2
    exponent = slopes.to(dtype)[:, None] * offset
    return torch.exp(-exponent)[:, None, :, None], torch.exp(exponent)[:, None, :, None]


def _carry_matrix(slopes: Tensor, chunks: int, dtype: torch.dtype) -> Tensor:
    """Weight of chunk j in the state before chunk i, [heads, chunks + 1, chunks]. The last row is the final state."""
    i = torch.arange(chunks + 1, device=slopes.device)[:, None]
    j = torch.arange(chunks, device=slopes.device)[None, :]
    distance = ((i - 1 - j) * CHUNK).clamp(min=0).to(dtype)
    return torch.exp(-slopes.to(dtype)[:, None, None] * distance) * (j < i)


def _segment(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One segment of whole chunks: scaled q, k, v [batch, heads, chunks, CHUNK, head_dim]; `state` before the first."""
    dtype = state.dtype
    chunks = q.shape[2]
    q_weight, k_weight = _chunk_weights(slopes, dtype)
    middle = CHUNK // 2
    gamma = torch.exp(-slopes.to(dtype))[:, None, None]
    q = (q * q_weight).to(v.dtype)
    k = (k * k_weight).to(v.dtype)
    scores = torch.tril(q @ k.transpose(-1, -2))
    # k carries gamma^(m - i); gamma^(C - 1 - m) is missing to the end of the chunk.
    update = (k.transpose(-1, -2) @ v).to(dtype) * gamma[..., None] ** (CHUNK - 1 - middle)
    flat = update.flatten(-2)
    carried = _carry_matrix(slopes, chunks, dtype) @ flat
    decayed = torch.exp(
        -slopes.to(dtype)[:, None] * torch.arange(chunks + 1, device=slopes.device, dtype=dtype) * CHUNK
    )
    states = carried + decayed[..., None] * state.flatten(-2)[:, :, None, :]
    states = states.view(*states.shape[:-1], *state.shape[-2:])
    before = (states[:, :, :-1] * gamma[..., None] ** (middle + 1)).to(v.dtype)
    return scores @ v + q @ before, states[:, :, -1]


def chunked_lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lightning Attention in chunks of CHUNK tokens: matrix products instead of a recurrence, memory linear in time.

    slopes [heads]. Matrix products run in q's dtype, the state is fp32 (fp64 for fp64 inputs). Returns o in q's dtype
    and the state after the last token. Differentiable by autograd.
    """
    dtype = reference_dtype(q)
    batch, time, heads, head_dim = q.shape
    state = q.new_zeros(batch, heads, head_dim, v.shape[-1], dtype=dtype)
    if initial_state is not None:
        state = initial_state.to(dtype)
    if time == 0:
        return torch.zeros_like(q), state
    padding = -time % CHUNK
    # Padded keys are zero and add nothing to the state. The decay over the padding is undone at the end.
    q, k, v = (
        torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, padding)).unflatten(2, (-1, CHUNK))
        for x in (q * scale, k, v)
    )
    outputs = []
    for start in range(0, q.shape[2], CHUNKS_PER_SEGMENT):
        part = slice(start, start + CHUNKS_PER_SEGMENT)
        output, state = _segment(q[:, :, part], k[:, :, part], v[:, :, part], slopes, state)
        outputs.append(output)
    output = torch.cat(outputs, 2).flatten(2, 3)[:, :, :time].transpose(1, 2)
    return output, state * torch.exp(slopes.to(dtype) * padding)[:, None, None]
