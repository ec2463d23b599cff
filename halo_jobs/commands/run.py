"""halo run, demo, cancel."""

from __future__ import annotations

import shlex
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from halo_jobs.commands.consoles import console

RecipeArgument = Annotated[
    Path,
    typer.Argument(help="A recipe file, or the name of a shipped one (demo, hypenet-2b)."),
]
RunsOption = Annotated[
    Path, typer.Option("--runs", help="Folder of all runs; a run is a folder of its own in it.")
]
NameOption = Annotated[
    str | None, typer.Option("--run", help="Name of the run; by default the recipe's name.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one key, e.g. --set distill.steps=200. May be given several times."),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Print what is kept, what is new and why, and what it costs; write nothing."),
]


class Executor(StrEnum):
    """Where stages run."""

    LOCAL = "local"
    SLURM = "slurm"
    RAY = "ray"


ExecutorOption = Annotated[
    Executor,
    typer.Option(
        "--executor",
        help="local: this machine, stage after stage. slurm: every stage a job, as the recipe's cluster section asks. "
        "ray: as local, but sweep and evaluations are for Ray, as the recipe's fan_out section asks.",
    ),
]
DetachOption = Annotated[
    bool,
    typer.Option(
        "--detach", help="With slurm: submit all stages, each after what it depends on, and return."
    ),
]


def _run(
    recipe: Path,
    runs: Path,
    name: str | None,
    settings: list[str] | None,
    dry_run: bool,
    executor: Executor = Executor.LOCAL,
    detach: bool = False,
) -> None:
    from halo_jobs.recipe import load_recipe

    overrides = [*(settings or []), *([f"name={name}"] if name else [])]
    if executor is Executor.RAY:
        overrides.append("fan_out.backend=ray")
    loaded = load_recipe(recipe, overrides)
    # Imported after the recipe is known to be good: torch and megatron take seconds to load.
    from halo_jobs.dry_run import print_plan
    from halo_jobs.pipeline import print_batch_script, run_recipe, run_recipe_on_slurm

    if detach and executor is not Executor.SLURM:
        raise ValueError("--detach leaves the stages to Slurm; add --executor slurm")
    if dry_run:
        print_plan(loaded, runs, console)
        if executor is Executor.SLURM:
            print_batch_script(loaded, runs, console)
        return
    if executor is Executor.SLURM:
        report = run_recipe_on_slurm(loaded, runs, console, detach=detach)
    else:
        report = run_recipe(loaded, runs, console)
    if report is None:
        console.print("Look after them with `halo status`, end them with `halo cancel`.", highlight=False)
        return
    usage = shlex.join([command_name(), "generate", str(report.parent), "The state of the Union is"])
    console.print(f"\nReport: {report.resolve().as_uri()}", soft_wrap=True, highlight=False)
    console.print(f"Use the model:\n  {usage}", soft_wrap=True, highlight=False, markup=False)


def command_name() -> str:
    """`halo`, or the path it was started by when the user's PATH has no such command."""
    invoked = sys.argv[0]
    return invoked if Path(invoked).name == "halo" and shutil.which("halo") != invoked else "halo"


def run(
    recipe: RecipeArgument,
    runs: RunsOption = Path("runs"),
    name: NameOption = None,
    settings: SetOption = None,
    dry_run: DryRunOption = False,
    executor: ExecutorOption = Executor.LOCAL,
    detach: DetachOption = False,
) -> None:
    """Run every stage of a recipe, or resume it: finished stages are kept, the others go on from their checkpoint.

    A changed recipe runs the stages whose results depend on the change; `--dry-run` says which, and why.

    Stop it with Ctrl-C (or kill -9) whenever you like; the same command goes on to the same weights. SIGTERM, SIGUSR2
    or a file `stop` in the folder of a training stage saves first and ends with exit code 75.

    With `--executor slurm` this command only looks after the jobs. Stopped, they go on; started again, it adopts them.
    `halo cancel` ends them.
    """
    _run(recipe, runs, name, settings, dry_run, executor, detach)


def cancel(
    run_folder: Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo.")],
    stage: Annotated[str | None, typer.Argument(help="Only this stage, such as align.")] = None,
) -> None:
    """End a run's Slurm jobs, waiting or running. Training stages save first; `halo run` goes on from there."""
    from halo_cluster.slurm.queue import cancel_run

    jobs = cancel_run(run_folder, stage)
    console.print(
        f"Ended: {', '.join(jobs)}" if jobs else "No job of it is in Slurm's queue.", highlight=False
    )


def demo(runs: RunsOption = Path("runs"), settings: SetOption = None, dry_run: DryRunOption = False) -> None:
    """Convert the embedded 8M-parameter teacher on this machine, in less than eight minutes on two CPU cores.

    Stop it with Ctrl-C at any time; the same command resumes it.
    """
    _run(Path("demo"), runs, None, settings, dry_run)
