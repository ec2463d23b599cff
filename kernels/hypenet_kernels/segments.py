"""The work list of the Lightning kernels: which block of the GPU computes which segment of which sequence.

An item has eight int32 fields: sequence, head, batch row, first token of the sequence in that row, tokens of the
sequence, first chunk of the segment, chunk after its last, halo. Chunks count from the start of the sequence, or from
its end when a kernel reads it backwards. The halo is the number of chunks before the segment that are replayed to
rebuild its start state.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# A token has the weight gamma^distance. Tokens below 2^-25 are dropped: half a rounding step of fp32.
HALO_BITS = 25
# Measured cost of a replayed chunk relative to a computed one. It reads two of three tiles, does one of four products.
HALO_COST = 0.45


def halo_chunks(slopes: tuple[float, ...], chunk: int) -> list[int]:
    """Halo of every head in chunks: one more than its tokens fill, because a sequence's last chunk may be short.

    Its tokens are those up to the distance at which exp(-slope * distance) falls to 2^-HALO_BITS.
    """
    tokens = HALO_BITS * math.log(2)
    return [min(2**30, math.ceil(tokens / slope / chunk) + 1) if slope > 0 else 2**30 for slope in slopes]


@functools.lru_cache(maxsize=64)
def log2_gammas(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    """log2 of every head's decay, fp32 [heads]. Cached, because the copy to the device would wait for its queue."""
    return torch.tensor([-slope / math.log(2) for slope in slopes], dtype=torch.float32).to(device)


def _segment_lengths(halos: list[int], chunks: int, cost: float) -> list[int] | None:
    """Chunks per segment such that no segment costs more than `cost` chunks, halo included; None if impossible."""
    if cost >= chunks:
        return [chunks] * len(halos)
    lengths = [math.floor(cost - HALO_COST * min(halo, chunks)) for halo in halos]
    return lengths if min(lengths) >= 1 else None


def balanced_segments(halos: list[int], chunks: int, sequences: int, slots: int, exact: bool) -> list[int]:
    """Chunks per segment for every head that finish soonest when `slots` blocks run at once.

    A slowly decaying head has a long halo and therefore shorter segments. With `exact`, sequences stay whole.
    """
    best = [chunks] * len(halos)
    if exact or chunks <= 1:
        return best
    best_time = math.ceil(sequences * len(halos) / slots) * chunks * 1.0
    for waves in range(1, 5):
        low, high = 1.0, float(chunks)
        for _ in range(20):
            cost = (low + high) / 2
            lengths = _segment_lengths(halos, chunks, cost)
            items = sequences * sum(math.ceil(chunks / n) for n in lengths) if lengths else math.inf
            low, high = (low, cost) if items <= waves * slots else (cost, high)
        if waves * high < best_time * 0.99:
            best_time, best = waves * high, _segment_lengths(halos, chunks, high) or best
    # The same number of segments, of equal length as far as possible.
    return [math.ceil(chunks / math.ceil(chunks / length)) for length in best]


@functools.lru_cache(maxsize=256)
def batch_items(
    slopes: tuple[float, ...],
    batch: int,
    time: int,
    chunk: int,
    slots: int,
    exact: bool,
    device: torch.device,
) -> Tensor:
    """Work list int32 [items, 8] for `batch` sequences of `time` tokens. The most expensive heads come first."""
    chunks = math.ceil(time / chunk)
    halos = halo_chunks(slopes, chunk)
    lengths = balanced_segments(halos, chunks, batch, slots, exact)
    items = [
        (row, head, row, 0, time, begin, min(begin + lengths[head], chunks), halos[head])
        for head in sorted(range(len(slopes)), key=lambda head: -halos[head])
        for begin in range(0, chunks, lengths[head])
        for row in range(batch)
    ]
    return torch.tensor(items, dtype=torch.int32).to(device)


@functools.lru_cache(maxsize=256)
def _packed_layout(
    slopes: tuple[float, ...],
    sequences: int,
    time: int,
    chunk: int,
    slots: int,
    exact: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The part of a packed batch's work list that does not depend on the boundaries of the sequences.

    Chunks per segment [heads]; head of every item [items]; number of every item within its head [items]; halos [heads].
    """
    halos = halo_chunks(slopes, chunk)
    lengths = balanced_segments(halos, math.ceil(time / chunk), 1, slots, exact)
    counts = [math.ceil(math.ceil(time / chunk) / length) + sequences for length in lengths]
    heads = torch.repeat_interleave(torch.arange(len(slopes)), torch.tensor(counts))
    numbers = torch.cat([torch.arange(count) for count in counts])
    tables = (torch.tensor(lengths), heads, numbers, torch.tensor(halos))
    return tuple(table.to(device) for table in tables)  # type: ignore[return-value]


def packed_items(
    slopes: tuple[float, ...], cu_seqlens: Tensor, time: int, chunk: int, slots: int, exact: bool
) -> Tensor:
    """Work list int32 [items, 8] for packed sequences: number n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of row 0.

    Computed on the device without synchronisation: the list has the length of the worst case, spare items are empty.
    """
    device = cu_seqlens.device
    sequences = len(cu_seqlens) - 1
    segment, heads, numbers, halos = _packed_layout(slopes, sequences, time, chunk, slots, exact, device)
    starts = cu_seqlens.long()
    tokens = starts.diff()
    chunks = (tokens + chunk - 1).div(chunk, rounding_mode="floor")
    segments = (chunks + segment[:, None] - 1).div(segment[:, None], rounding_mode="floor")
    ends = segments.cumsum(1)
    # One sorted row of segment counts per head. Shifted by an offset per row, they form one sorted list to search.
    stride = time + sequences + 1
    offset = torch.arange(len(slopes), device=device)[:, None] * stride
    found = torch.searchsorted((ends + offset).flatten(), numbers + heads * stride, right=True)
    sequence = (found - heads * sequences).clamp(max=sequences - 1)
    spare = numbers >= ends[heads, -1]
    within = numbers - (ends - segments)[heads, sequence]
    begin = within * segment[heads]
    end = torch.minimum(begin + segment[heads], chunks[sequence])
    begin = torch.where(spare, 0, begin)
    end = torch.where(spare, 0, end)
    row = torch.zeros_like(begin)
    fields = (sequence, heads, row, starts[sequence], tokens[sequence], begin, end, halos[heads])
    return torch.stack(fields, 1).int()
