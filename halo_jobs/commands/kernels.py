"""halo kernels: the Triton kernels on this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from halo_jobs.commands.consoles import console

kernels = typer.Typer(no_args_is_help=True, help="The Triton kernels on this machine.")


@kernels.callback()
def _group() -> None:
    """Keeps `warmup` a subcommand while it is the only one."""


@kernels.command("warmup")
def warmup(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="A Qwen3 size, such as qwen3-1.7b; may be given several times. Default: all."
        ),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Ranks that share a layer; kernels depend on the heads of one rank.")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be compiled, and stop.")] = False,
) -> None:
    """Compile the kernels for this machine's GPU ahead of a job, so that its first step does not.

    Run it once per kind of GPU on a node that has one, e.g. `srun --gpus 1 halo kernels warmup`. What is compiled lies
    in Triton's cache (TRITON_CACHE_DIR, else ~/.triton/cache); put that on a filesystem that the nodes share. Nothing
    is tuned: tile sizes are fixed per card in a table. Heads must divide by --tensor-parallel.
    """
    import torch

    from hypenet_kernels.warm_up import warm_up_calls
    from hypenet_megatron.presets import QWEN3_SHAPES

    for name in models or []:
        if name not in QWEN3_SHAPES:
            raise ValueError(f"there is no model {name}; choose from {', '.join(QWEN3_SHAPES)}")
    # Kernels depend on heads and head_dim alone, so sizes with equal ones share them.
    chosen = {
        (shape.query_heads, shape.head_dim): shape
        for name, shape in QWEN3_SHAPES.items()
        if not models or name in models
    }
    for shape in chosen.values():
        if shape.query_heads % tensor_parallel:
            raise ValueError(
                f"{shape.name} has {shape.query_heads} heads, which {tensor_parallel} ranks cannot share evenly; "
                "choose a --tensor-parallel that divides them"
            )
    if not dry_run and not torch.cuda.is_available():
        raise ValueError(
            "kernels are compiled for the GPU of this machine, and torch sees none; run this on a node with one, e.g. "
            "`srun --gpus 1 halo kernels warmup` (on CPU there is nothing to compile)"
        )
    device = torch.device("meta" if dry_run else "cuda")
    calls = [
        (f"{shape.query_heads // tensor_parallel} heads of {shape.head_dim}: {what}", call)
        for shape in chosen.values()
        for what, call in warm_up_calls(
            shape.query_heads // tensor_parallel, shape.head_dim, shape.hidden_size, torch.bfloat16, device
        )
    ]
    if dry_run:
        for what, _ in calls:
            console.print(what, highlight=False)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(calls))
        for what, call in calls:
            progress.update(task, description=what)
            call()
            progress.advance(task)
        torch.cuda.synchronize()
    console.print(f"{len(calls)} kernels are compiled for {torch.cuda.get_device_name()}", highlight=False)
