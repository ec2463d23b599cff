"""halo kernels: the Triton kernels on this machine."""

from __future__ import annotations

from itertools import chain
from typing import Annotated

import typer

from halo_jobs.commands.consoles import console
from terminal_output import ProgressBar

kernels = typer.Typer(no_args_is_help=True, help="The Triton kernels on this machine.")


@kernels.callback()
def _group() -> None:
    """Without a callback, typer would run the only subcommand as `halo kernels`."""


@kernels.command("warmup")
def warmup(
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="A Qwen3 size, such as qwen3-1.7b; repeat for more. Default: all."),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Ranks that share a layer. Kernels depend on the heads per rank.")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be compiled, and stop.")] = False,
) -> None:
    """Compile the kernels for this machine's GPU, so that the first step of a job does not have to.

    Run it once per kind of GPU, on a node that has one, for example with `srun --gpus 1 halo kernels warmup`. Compiled
    kernels go to Triton's cache (TRITON_CACHE_DIR, else ~/.triton/cache), which should be on a file system that the
    nodes share. Nothing is tuned: a table fixes the tile sizes for each GPU.
    """
    import torch

    from hypenet_kernels.warm_up import loss_calls
    from hypenet_megatron.mixers import MIXERS
    from hypenet_megatron.presets import QWEN3_SHAPES

    for name in models or []:
        if name not in QWEN3_SHAPES:
            raise ValueError(f"--model {name} is not a known size; choose from {', '.join(QWEN3_SHAPES)}")
    # Kernels depend on heads and head_dim only, so sizes with the same ones share them.
    chosen = {
        (shape.query_heads, shape.head_dim): shape
        for name, shape in QWEN3_SHAPES.items()
        if not models or name in models
    }
    for shape in chosen.values():
        if shape.query_heads % tensor_parallel:
            raise ValueError(
                f"--tensor-parallel {tensor_parallel} does not divide the {shape.query_heads} heads of {shape.name}; "
                "choose one that does"
            )
    if not dry_run and not torch.cuda.is_available():
        raise ValueError(
            "torch sees no GPU on this machine; run this on a node that has one, for example with "
            "`srun --gpus 1 halo kernels warmup` (CPUs need no compiled kernels)"
        )
    device = torch.device("meta" if dry_run else "cuda")
    calls = []
    for shape in chosen.values():
        heads, dtype = shape.query_heads // tensor_parallel, torch.bfloat16
        of_mixers = [spec.warm_up(heads, shape.head_dim, dtype, device) for spec in MIXERS.values() if spec.warm_up]
        for what, call in chain(*of_mixers, loss_calls(shape.hidden_size, dtype, device)):
            calls.append((f"{heads} heads of {shape.head_dim}: {what}", call))
    if dry_run:
        for what, _ in calls:
            console.print(what, highlight=False)
        return
    with ProgressBar("compiling kernels", len(calls), console) as bar:
        for what, call in calls:
            bar.advance(0, what)
            call()
            bar.advance(1)
        torch.cuda.synchronize()
    console.print(f"Compiled {len(calls)} kernels for {torch.cuda.get_device_name()}", highlight=False)
