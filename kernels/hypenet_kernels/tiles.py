"""Tile sizes of the Lightning kernels. They are fixed: no autotuning runs at a user's first call.

Each kernel and dtype has a short list, best first. `choose_tile` takes the first tile that the device supports and has
the shared memory for. Hopper keeps the operands of matrix products in shared memory (227 KiB per block on an H200).
Older cards keep them in registers, where a large tile spills, so an A100 or an RTX 4090 gets a smaller tile. Tiles for
Hopper were chosen by measured time, the others by the compiler's register counts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Tile:
    """How one block works: tokens per chunk, columns of the state, and how many blocks share a multiprocessor.

    `shared_memory` is the compiler's maximum at head_dim 128, in bytes. A test compares it with the compiler.
    """

    chunk: int
    columns: int
    warps: int
    stages: int
    blocks_per_multiprocessor: int
    shared_memory: int
    oldest_capability: tuple[int, int] = OLDEST_CAPABILITY


_BF16 = (
    Tile(64, 64, 4, 2, 2, 90_112, oldest_capability=(9, 0)),
    Tile(32, 64, 8, 2, 1, 36_864),
)
# fp32 products run on CUDA cores with operands in registers, where larger tiles spill kilobytes.
_FP32 = (Tile(16, 32, 8, 1, 1, 19_456),)
TILES: dict[tuple[str, torch.dtype], tuple[Tile, ...]] = {
    ("forward", torch.bfloat16): _BF16,
    ("backward", torch.bfloat16): _BF16,
    ("forward", torch.float32): _FP32,
    ("backward", torch.float32): _FP32,
}


@dataclass(frozen=True)
class DeviceLimits:
    """The properties of a device that choose_tile depends on; shared memory in bytes per block."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


@functools.lru_cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Limits of a CUDA device. A CPU device stands for Triton's interpreter, which has none that matter."""
    if device.type != "cuda":
        return DeviceLimits("interpreter", (9, 0), 4, 2**20)
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def choose_tile(kernel: str, dtype: torch.dtype, limits: DeviceLimits) -> Tile:
    """The best tile of `kernel` ("forward" or "backward") for `dtype` on this device; ValueError if there is none."""
    if (kernel, dtype) not in TILES:
        raise ValueError(
            f"Lightning Attention takes bfloat16 or float32, not {str(dtype).removeprefix('torch.')}; "
            "convert the inputs (float16 overflows in the state)"
        )
    if limits.capability < OLDEST_CAPABILITY:
        raise ValueError(
            f"{limits.name} has compute capability {limits.capability[0]}.{limits.capability[1]}; the kernels need 8.0 "
            "(A100, RTX 30 series) or newer; use such a card, or CPU tensors"
        )
    for tile in TILES[kernel, dtype]:
        if limits.capability >= tile.oldest_capability and limits.shared_memory >= tile.shared_memory:
            return tile
    raise ValueError(
        f"{limits.name} offers {limits.shared_memory} bytes of shared memory per block, but the {kernel} kernel for "
        f"{dtype} needs {TILES[kernel, dtype][-1].shared_memory}; use a card that has them"
    )
