"""The `halo` command. Every subcommand is thin: it calls a function that a notebook could call too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn Qwen3 models into HypeNet hybrids (a quarter softmax attention, three quarters recurrent) by HALO "
    "distillation. Start with `halo demo`; then `halo run RECIPE --dry-run`.",
)

RecipeArgument = Annotated[
    Path,
    typer.Argument(help="A recipe file, or the name of a shipped one (demo, teacher-small, halo-small)."),
]
RunsOption = Annotated[
    Path, typer.Option("--runs", help="Folder of all runs; a run is a folder of its own in it.")
]
NameOption = Annotated[
    str | None, typer.Option("--run", help="Name of the run; by default the recipe's name.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one key, e.g. --set distil.steps=200. May be given several times."),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Print stages, parameters, memory and time; run nothing, write nothing."),
]

console = Console()
errors = Console(stderr=True)


def _run(recipe: Path, runs: Path, name: str | None, settings: list[str] | None, dry_run: bool) -> None:
    from halo_jobs.recipe import load_recipe

    overrides = [*(settings or []), *([f"name={name}"] if name else [])]
    loaded = load_recipe(recipe, overrides)
    # Imported after the recipe is known to be good: torch and megatron take seconds to load.
    from halo_jobs.pipeline import print_plan, run_recipe

    if dry_run:
        print_plan(loaded, runs, console)
        return
    result = run_recipe(loaded, runs, console)
    console.print(f"\nReport: {result.report}", soft_wrap=True)
    exported = sorted(result.stage_folders["export"].glob("*/config.json"))
    if exported:
        folder = exported[0].parent
        console.print(
            "Use the model:\n"
            f"  python -c \"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; d='{folder}'; "
            "t = T.from_pretrained(d); m = M.from_pretrained(d, trust_remote_code=True); "
            "print(t.decode(m.generate(**t('The Congress', return_tensors='pt'), max_new_tokens=40)[0]))\"",
            soft_wrap=True,
            highlight=False,
        )


@app.command()
def run(
    recipe: RecipeArgument,
    runs: RunsOption = Path("runs"),
    name: NameOption = None,
    settings: SetOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Run every stage of a recipe, or resume it: finished stages are kept, the others go on from their checkpoint."""
    _run(recipe, runs, name, settings, dry_run)


@app.command()
def demo(runs: RunsOption = Path("runs"), settings: SetOption = None, dry_run: DryRunOption = False) -> None:
    """Convert the embedded 8M-parameter teacher on this machine, about ten minutes on two CPU cores.

    Ctrl-C at any time; the same command resumes.
    """
    _run(Path("demo"), runs, None, settings, dry_run)


@app.command()
def pretrain(
    recipe: RecipeArgument = Path("teacher-small"),
    runs: RunsOption = Path("runs"),
    name: NameOption = None,
    settings: SetOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Train a small Qwen3-architecture teacher from scratch and export it as a Hugging Face folder."""
    _run(recipe, runs, name, settings, dry_run)


def main() -> None:
    """Entry point: user errors end in one sentence and exit code 2, failures in one sentence and exit code 1."""
    try:
        app(standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        errors.print("interrupted; the same command resumes")
        sys.exit(130)
    except ValueError as problem:
        _fail(problem, 2)
    except (RuntimeError, OSError) as problem:
        _fail(problem, 1)


def _fail(problem: Exception, code: int) -> None:
    errors.print(f"[red]error:[/red] {_first_line(problem)}", soft_wrap=True, highlight=False)
    sys.exit(code)


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__


if __name__ == "__main__":
    main()
