"""Compiles every kernel for GPUs that need not be there, and prints what each came to as JSON.

    python tests/support/compile_kernels.py 80 90

Run by test_compilation.py in a process of its own, because Triton's interpreter, once chosen, cannot be left.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hypenet_kernels import softmax_rows
from hypenet_kernels.decode import DEFERRED_BLOCKS, IN_PLACE_BLOCKS, WINDOW
from hypenet_kernels.query_key_norm import ROWS
from hypenet_kernels.tiles import TILES
from hypenet_kernels.triton_kernels import decode, gated_norm, lightning_scan, norm_rope, softmax_losses

HEADS, HEAD_DIM = 16, 128
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
INT32 = {"items", "slots", "pending"}
INT64 = {"labels"}
FP32 = {
    "state", "initial_state", "final_state", "d_final_state", "d_initial_state", "log2_gammas", "cos", "sin",
    "sum_squares", "d_sum_squares", "partial_dweight", "student", "teacher", "maxima", "sums", "weights",
    "student_log_total", "teacher_log_total",
}  # fmt: skip
FLOATS = {"scale", "epsilon"}
NUMBERS = re.compile(r".*_(batch|time|head|row)$|heads|time|tokens|rows|columns|channels|first_label")

Variant = tuple[str, Any, int, dict[str, Any]]  # name, kernel, warps, constexprs


def variants(capability: int) -> Iterator[Variant]:
    for (which, dtype), tiles in TILES.items():
        kernel = lightning_scan.lightning_forward if which == "forward" else lightning_scan.lightning_backward
        states = {"HAS_INITIAL": True, "HAS_FINAL": True} if which == "forward" else {"HAS_STATES": True}
        precision = "tf32" if dtype == torch.bfloat16 else "ieee"
        for number, tile in enumerate(tiles):
            if tile.oldest_capability > divmod(capability, 10):
                continue
            constants = {"D": HEAD_DIM, "BV": tile.columns, "C": tile.chunk, "STAGES": tile.stages}
            name = f"lightning {which} {str(dtype).removeprefix('torch.')} {number}"
            yield name, kernel, tile.warps, {**constants, **states, "PRECISION": precision}
    heads = {"HEADS": HEADS, "HALF": HEAD_DIM // 2, "ROWS": ROWS, "HEADS_PER_TILE": 16, "HAS_ROPE": True}
    yield "norm_rope forward", norm_rope.norm_rope_forward, 4, heads
    yield "norm_rope backward", norm_rope.norm_rope_backward, 4, heads
    channels = {"CHANNELS": HEADS * HEAD_DIM, "BLOCK": HEADS * HEAD_DIM}
    for has_sum in (False, True):
        constants = {**channels, "D": HEAD_DIM, "HAS_SUM": has_sum}
        yield f"gated_norm forward {has_sum}", gated_norm.gated_norm_forward, 4, constants
        yield f"gated_norm backward {has_sum}", gated_norm.gated_norm_backward, 4, {**constants, "STAGES": 2}
    yield "sum_of_squares forward", gated_norm.sum_of_squares_forward, 4, channels
    yield "sum_of_squares backward", gated_norm.sum_of_squares_backward, 4, channels
    for block in IN_PLACE_BLOCKS:
        constants = {"D": HEAD_DIM, "BV": block.columns}
        yield f"decode in place {block.columns}", decode.decode_in_place, block.warps, constants
    for block in DEFERRED_BLOCKS:
        constants = {
            "D": HEAD_DIM,
            "BV": block.columns,
            "BD": block.rows,
            "STAGES": block.stages,
            "WINDOW": WINDOW,
        }
        yield f"decode deferred {block.columns}", decode.decode_deferred, block.warps, constants
    for teacher in (False, True):
        statistics = {"HAS_TEACHER": teacher, "BLOCK": softmax_rows.STATISTICS_BLOCK}
        gradients = {"HAS_TEACHER": teacher, "BLOCK": softmax_rows.GRADIENT_BLOCK}
        warps = softmax_rows.WARPS
        yield f"row_statistics {teacher}", softmax_losses.row_statistics, warps, statistics
        yield f"row_gradients {teacher}", softmax_losses.row_gradients, warps, gradients


def _parameter_type(name: str, data: str) -> str:
    if name in FLOATS:
        return "fp32"
    if NUMBERS.fullmatch(name):
        return "i32"
    if name in INT32 or name in INT64:
        return "*i32" if name in INT32 else "*i64"
    return "*fp32" if name in FP32 else f"*{data}"


def compile_one(variant: Variant, capability: int) -> dict[str, Any]:
    """Registers per thread, bytes spilled by a thread, bytes of shared memory per block."""
    name, kernel, warps, constants = variant
    data = "fp32" if "float32" in name else "bf16"
    signature = {
        parameter: "constexpr" if parameter in constants else _parameter_type(parameter, data)
        for parameter in kernel.arg_names
    }
    # Tensors are aligned and sizes divisible by 16, as in every real model.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(signature.values())
        if kind.startswith("*") or kind == "i32"
    }
    constexprs = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as assembly:
        assembly.write(compiled.asm["ptx"])
        assembly.flush()
        architecture = f"sm_{capability}{'a' if capability == 90 else ''}"
        command = [str(PTXAS), f"-arch={architecture}", "-v", assembly.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (
        re.search(r"Used (\d+) registers", report),
        re.search(r"(\d+) bytes spill stores", report),
    )
    assert registers and spilled, report
    return {
        "name": name,
        "kernel": kernel.__name__,
        "capability": capability,
        "registers": int(registers[1]),
        "spilled": int(spilled[1]),
        "shared": compiled.metadata.shared,
    }


if __name__ == "__main__":
    print(json.dumps([compile_one(v, int(c)) for c in sys.argv[1:] for v in variants(int(c))], indent=1))
