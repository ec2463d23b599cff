"""Compiles every kernel for Ampere and Hopper without a GPU, and checks spills and shared memory."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hypenet_kernels import triton_kernels
from hypenet_kernels.tiles import TILES, DeviceLimits, choose_tile

SCRIPT = Path(__file__).parents[1] / "support" / "compile_kernels.py"
CAPABILITIES = (80, 90)
# Bytes that a thread may spill, by kernel and capability; 0 for all others. Measured and rounded up: the backward pass
# keeps three states alive for a few instructions, and fp32 dots have their operands in registers.
SPILLS = {
    ("lightning forward bfloat16 0", 90): 64,
    ("lightning backward bfloat16 0", 90): 320,
    ("lightning forward bfloat16 1", 80): 32,
    ("lightning backward bfloat16 1", 80): 64,
    **{
        (f"lightning {which} float32 0", capability): 576
        for which in ("forward", "backward")
        for capability in CAPABILITIES
    },
}
H200 = DeviceLimits("NVIDIA H200", (9, 0), 132, 232_448)
A100 = DeviceLimits("NVIDIA A100", (8, 0), 108, 166_912)
RTX_4090 = DeviceLimits("NVIDIA GeForce RTX 4090", (8, 9), 128, 101_376)
V100 = DeviceLimits("Tesla V100", (7, 0), 80, 98_304)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),  # an empty cache
    }
    command = [sys.executable, str(SCRIPT), *map(str, CAPABILITIES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_kernel_is_left_out(compiled):
    """Public functions of triton_kernels are kernels; names of helpers begin with an underscore."""
    compiled_kernels = {result["kernel"] for result in compiled}
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        names = vars(importlib.import_module(f"{triton_kernels.__name__}.{module.name}"))
        kernels = {name for name, x in names.items() if hasattr(x, "arg_names") and not name.startswith("_")}
        assert kernels, module.name
        assert kernels <= compiled_kernels
    assert {result["capability"] for result in compiled} == set(CAPABILITIES)


def test_spills_stay_within_the_budget(compiled):
    over = [
        result
        for result in compiled
        if result["spilled"] > SPILLS.get((result["name"], result["capability"]), 0)
    ]
    assert over == []


def test_tiles_need_the_shared_memory_that_they_claim(compiled):
    claimed = {
        f"lightning {which} {str(dtype).removeprefix('torch.')} {number}": tile.shared_memory
        for (which, dtype), tiles in TILES.items()
        for number, tile in enumerate(tiles)
    }
    needed = {name: max(r["shared"] for r in compiled if r["name"] == name) for name in claimed}
    for name, claim in claimed.items():
        assert 0.75 * claim <= needed[name] <= claim, name


def test_cards_get_tiles_that_they_can_run():
    for which in ("forward", "backward"):
        hopper, other = TILES[which, torch.bfloat16]
        assert choose_tile(which, torch.bfloat16, H200) is hopper
        assert choose_tile(which, torch.bfloat16, A100) is other
        assert choose_tile(which, torch.bfloat16, RTX_4090) is other


def test_other_cards_are_refused_by_name():
    with pytest.raises(ValueError, match=r"Tesla V100 has compute capability 7\.0; the kernels need 8\.0"):
        choose_tile("forward", torch.bfloat16, V100)
    with pytest.raises(ValueError, match="small card offers 10000 bytes of shared memory"):
        choose_tile("backward", torch.float32, DeviceLimits("small card", (8, 6), 10, 10_000))
    with pytest.raises(ValueError, match="not float16; convert"):
        choose_tile("forward", torch.float16, H200)
