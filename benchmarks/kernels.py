"""Compares the kernels with flash-linear-attention and the layer of the paper's code, on one GPU.

    python benchmarks/kernels.py --out results/

Outputs and gradients are checked against fp64 before they are timed, for all heads together and for the worst head.
Both sides are timed in the same run by the same code (median of CUDA events, L2 flushed before each call). Requires a
CUDA device and flash-linear-attention 0.6.0 (`pip install flash-linear-attention==0.6.0`). Writes kernels.json and
kernels.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reference_layer
import torch
import triton
from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
from table import plot, print_table
from torch import Tensor
from triton.testing import do_bench

from hypenet_kernels import (
    chunked_kl_divergence,
    chunked_lightning_attention,
    decay_slopes,
    gated_norm,
    lightning_attention,
    lightning_decode,
    lightning_decode_deferred,
    norm_rope,
)
from hypenet_kernels.decode import WINDOW

HEADS, HEAD_DIM = 16, 128
SCALE = HEAD_DIM**-0.5
EPSILON = 1e-6
SLOPES = decay_slopes(HEADS)
BOUND, WORST_HEAD_BOUND = 4e-3, 5e-3  # relative L2 of bf16 outputs and gradients against fp64
GIB = 2**30
LONGEST = (1, 131_072)
# (batch, time): required and intended speed-ups over fla, forward and forward + backward.
SHAPES: dict[tuple[int, int], tuple[tuple[float, float], tuple[float, float]]] = {
    (1, 16_384): ((2.5, 2.5), (4, 4)),
    LONGEST: ((2, 2), (2.8, 3)),
    (8, 4_096): ((1.8, 1.8), (2.6, 3)),
    (8, 512): ((4, 8), (8, 14)),
}


def gamma_exponents() -> Tensor:
    return -torch.tensor(SLOPES, dtype=torch.float32, device="cuda")


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return lightning_attention(q, k, v, SLOPES, SCALE)[0]


def fla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return chunk_simple_gla(q, k, v, scale=SCALE, g_gamma=gamma_exponents())[0]


def reference_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fla as the code of the paper calls it: on fp32 copies of bf16 tensors."""
    return fla(q.float(), k.float(), v.float()).to(q.dtype)


def median_ms(call: Callable[[], Any]) -> float:
    return float(do_bench(call, warmup=25, rep=150, return_mode="median"))


def random_inputs(batch: int, length: int, count: int = 4) -> list[Tensor]:
    shape = (batch, length, HEADS, HEAD_DIM)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def relative_errors(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative L2 errors: overall, and of the worst head; tensors [batch, time, heads, head_dim]."""
    difference = (found.double() - expected).square().sum((0, 1, 3))
    size = expected.square().sum((0, 1, 3))
    return float((difference.sum() / size.sum()).sqrt()), float((difference / size).max().sqrt())


def gradients(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = function(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def check_lightning(batch: int, length: int) -> dict[str, Any]:
    """Our errors and those of fla against fp64 on new inputs. Exits if ours exceed the bounds."""
    inputs = random_inputs(batch, length)
    slopes = torch.tensor(SLOPES, device="cuda", dtype=torch.float64)

    def judge(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunked_lightning_attention(q, k, v, slopes, SCALE)[0]

    q, k, v, do = (x.double() for x in inputs)
    # The gradients are Lightning Attention of other tensors, in part backwards in time, so fp64 needs no autograd.
    expected = [
        judge(q, k, v),
        judge(do, v, k),
        judge(v.flip(1), do.flip(1), q.flip(1)).flip(1),
        judge(k.flip(1), q.flip(1), do.flip(1)).flip(1),
    ]
    errors: dict[str, Any] = {}
    for who, function in (("ours", ours), ("fla", fla)):
        found = gradients(function, *inputs)
        errors[who] = {
            name: relative_errors(*pair)
            for name, *pair in zip(("o", "dq", "dk", "dv"), found, expected, strict=True)
        }
    for name, (overall, worst) in errors["ours"].items():
        if not (overall <= BOUND and worst <= WORST_HEAD_BOUND):
            raise SystemExit(f"[{batch}, {length}] {name}: error {overall:.2e}, worst head {worst:.2e}")
    return errors


def time_lightning(batch: int, length: int) -> dict[str, float]:
    q, k, v, do = random_inputs(batch, length)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cases: list[tuple[str, Any, list[Tensor], Tensor]] = [
        ("ours", ours, leaves, do),
        ("fla", fla, leaves, do),
    ]
    if (batch, length) == LONGEST:
        cases.append(("fla on fp32 copies", reference_call, leaves, do))
    result = {}
    for who, function, tensors, upstream in cases:

        def both(function: Any = function, tensors: Any = tensors, upstream: Any = upstream) -> Any:
            return torch.autograd.grad(function(*tensors), tensors, upstream)

        def forward(function: Any = function, tensors: Any = tensors) -> Any:
            with torch.no_grad():
                return function(*tensors)

        result[f"{who} forward"] = median_ms(forward)
        result[f"{who} forward+backward"] = median_ms(both)
        # Without the change of threads in autograd. A model pays for it once per step, a single call every time.
        with torch.autograd.set_multithreading_enabled(False):
            result[f"{who} forward+backward, one thread"] = median_ms(both)
    return result


def peak_extra_gib(call: Callable[[], Any]) -> float:
    """Peak memory during `call`, in addition to the memory allocated before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def memory_lightning() -> dict[str, float]:
    q, k, v, do = random_inputs(1, 131_072)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return {
        who: peak_extra_gib(lambda f=function: torch.autograd.grad(f(*leaves), leaves, do))
        for who, function in (("ours", ours), ("fla", fla))
    }


def floors(batch: int, length: int, copy_rate: float) -> dict[str, float]:
    """Milliseconds to read q, k, v and write o (4 tensors), and with gradients (11), at the copy rate in bytes/s."""
    tensor = batch * length * HEADS * HEAD_DIM * 2
    return {"forward": 4 * tensor / copy_rate * 1e3, "forward+backward": 11 * tensor / copy_rate * 1e3}


def measure_copy_rate() -> float:
    source = torch.randint(0, 255, (2 * GIB,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source)) * 1e-3)


def layer_results() -> dict[str, Any]:
    """One RNN layer at [1, 16384], projections included."""
    return reference_layer.compare(HEADS, HEAD_DIM, length=16_384, median_ms=median_ms)


def time_dispatcher() -> dict[str, float]:
    """Norm, RoPE, attention and gate of [1, 512], called directly and through torch's dispatcher: wall-clock ms.

    The host limits the speed of such short sequences. The results of both ways are equal bit for bit.
    """
    fused = torch.randn(1, 512, HEADS, 4, HEAD_DIM, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight, weights = (torch.randn(n, device="cuda").requires_grad_() for n in (HEAD_DIM, HEADS * HEAD_DIM))
    angles = torch.rand(512, HEAD_DIM // 2, device="cuda")
    leaves, rotation = (fused, weight, weights), (angles.cos(), angles.sin())

    def called() -> Tensor:
        query, key, value, gate = fused.unbind(3)
        query, key = norm_rope(query, key, weight, weight, *rotation, EPSILON)
        return gated_norm(ours(query, key, value), gate, weights, EPSILON)

    def dispatched() -> Tensor:
        operators = torch.ops.hypenet
        query, key, value, gate = fused.unbind(3)
        query, key = operators.norm_rope(query, key, weight, weight, *rotation, EPSILON)
        o, _ = operators.lightning_attention(
            query, key, value, None, None, SLOPES, SCALE, False, False, False
        )
        return operators.gated_norm(o, gate, weights, None, HEADS * HEAD_DIM, EPSILON)

    upstream = torch.randn_like(called())
    both = {
        name: lambda block=block: torch.autograd.grad(block(), leaves, upstream)
        for name, block in (("called", called), ("dispatched", dispatched))
    }
    assert torch.equal(called(), dispatched())
    assert all(torch.equal(a, b) for a, b in zip(both["called"](), both["dispatched"](), strict=True))
    with torch.autograd.set_multithreading_enabled(False):  # as in a model, which changes threads once per step
        result = {f"{name} forward+backward": ms for name, ms in alternating_wall_ms(both).items()}
    with torch.no_grad():
        forward = alternating_wall_ms({"called": called, "dispatched": dispatched})
    return result | {f"{name} forward": ms for name, ms in forward.items()}


def alternating_wall_ms(cases: dict[str, Callable[[], Any]], calls: int = 100) -> dict[str, float]:
    """Medians over 20 rounds of `calls` calls. The cases alternate, because the speed of the host varies."""
    rounds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(21):
        for name, call in cases.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
            rounds[name].append((time.perf_counter() - began) / calls * 1e3)
    return {name: statistics.median(found[1:]) for name, found in rounds.items()}


def captured_ms(steps: Callable[[], None], count: int) -> float:
    """Milliseconds per step of a CUDA graph that holds `count` steps."""
    torch.cuda.synchronize()  # the other stream does not wait for the kernels that fill the tensors
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return median_ms(graph.replay) / count


def time_decode(batch: int) -> dict[str, float]:
    """One token for every sequence. A graph holds 16 steps, so every deferred window is written once.

    The steps use the states of sixteen layers in turn, as in a model. At small batches those of one layer would stay in
    L2.
    """
    layers = WINDOW
    q, k, v = (torch.randn(batch, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    states = torch.randn(layers, batch, HEADS, HEAD_DIM, HEAD_DIM, device="cuda") * 0.1
    windows = torch.zeros(2, layers, batch, HEADS, WINDOW, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(batch, device="cuda", dtype=torch.int32)
    out = torch.empty_like(q)
    exponents = gamma_exponents()
    # Every layer is at another position of its window, so the 16 launches cover all 16 phases.
    phases = [torch.full((batch,), n, device="cuda", dtype=torch.int32) for n in range(WINDOW)]

    def in_place() -> None:
        for layer in range(layers):
            lightning_decode(q, k, v, states[layer], slots, SLOPES, SCALE, out)

    def deferred() -> None:
        for layer in range(layers):
            keys, values = windows[:, layer]
            lightning_decode_deferred(
                q, k, v, states[layer], keys, values, slots, phases[layer], SLOPES, SCALE, out
            )

    def fla_step() -> None:
        for layer in range(layers):
            fused_recurrent_simple_gla(
                q[:, None], k[:, None], v[:, None], g_gamma=exponents, scale=SCALE, initial_state=states[layer],
                output_final_state=True,
            )  # fmt: skip

    with torch.no_grad():
        check_decode(q, k, v, slots, exponents)
        return {
            "ours in place": captured_ms(in_place, layers),
            "ours deferred": captured_ms(deferred, layers),
            "fla": captured_ms(fla_step, layers),
        }


def check_decode(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, exponents: Tensor) -> None:
    """Compare both variants with fla's step in fp32, over one window."""
    batch = len(q)
    state = torch.randn(batch, HEADS, HEAD_DIM, HEAD_DIM, device="cuda")
    theirs, lagging = state.clone(), state.clone()
    windows = torch.zeros(2, batch, HEADS, WINDOW, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    for step in range(WINDOW):
        now = [x.roll(step, 0) for x in (q, k, v)]
        expected, theirs = fused_recurrent_simple_gla(
            *(x[:, None].float() for x in now), g_gamma=exponents, scale=SCALE, initial_state=theirs,
            output_final_state=True,
        )  # fmt: skip
        out, late = torch.empty_like(q), torch.empty_like(q)
        pending = torch.full((batch,), step, device="cuda", dtype=torch.int32)
        lightning_decode(*now, state, slots, SLOPES, SCALE, out)
        lightning_decode_deferred(*now, lagging, *windows, slots, pending, SLOPES, SCALE, late)
        for found in (out, late):
            error = (found - expected[:, 0]).norm() / expected.norm()
            assert float(error) <= BOUND, f"decode, batch {batch}, step {step}: {float(error):.1e}"
    for found in (state, lagging):
        assert float((found - theirs).norm() / theirs.norm()) <= 1e-5


def memory_kl() -> dict[str, float]:
    """Peak of forward and backward at Qwen3 size, without inputs, outputs and the fp32 gradient of the head."""
    tokens, vocabulary, hidden_size = 8192, 151_936, 2048
    make = {"device": "cuda", "dtype": torch.bfloat16}
    hidden, teacher_hidden = (torch.randn(tokens, hidden_size, **make) for _ in range(2))
    weight, teacher_weight = (torch.randn(vocabulary, hidden_size, **make) * 0.05 for _ in range(2))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    token_weights = torch.full((tokens,), 1 / tokens, device="cuda")

    def both() -> tuple[Tensor, ...]:
        loss = chunked_kl_divergence(*leaves, teacher_hidden, teacher_weight, token_weights)
        return torch.autograd.grad(loss, leaves)

    outputs = (hidden.numel() + weight.numel()) * 2 / GIB
    gradient = weight.numel() * 4 / GIB
    return {"extra GiB": peak_extra_gib(both) - outputs - gradient, "ms": median_ms(both)}


def environment() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown (no git here)",
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.json and kernels.png")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "environment": environment(),
        "copy_rate": measure_copy_rate(),
        "lightning": {},
    }
    for batch, length in SHAPES:
        name = f"[{batch},{length},{HEADS}]"
        errors = check_lightning(batch, length)
        torch.cuda.empty_cache()
        times = time_lightning(batch, length)
        floor = floors(batch, length, results["copy_rate"])
        results["lightning"][name] = {"errors": errors, "ms": times, "floor_ms": floor}
        print(name, {key: round(value, 4) for key, value in times.items()}, flush=True)
    for name, measure in (
        ("memory_gib", memory_lightning),
        ("layer", layer_results),
        ("dispatcher_ms", time_dispatcher),
        ("decode_ms", lambda: {str(batch): time_decode(batch) for batch in (1, 32, 256)}),
        ("kl", memory_kl),
    ):
        results[name] = measure()
        print(name, results[name], flush=True)
        (out / "kernels.json").write_text(json.dumps(results, indent=1))
    print_table(results, SHAPES)
    plot(results, out / "kernels.png")


if __name__ == "__main__":
    main()
