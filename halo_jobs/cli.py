"""The `halo` command. Its subcommands are thin: they call functions that a notebook can call too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer
from rich.text import Text

from halo_cluster import StopRequested
from halo_cluster.signals import InterruptHandler
from halo_jobs.commands import compare, data, doctor, gc, generate, kernels, look, run, weights
from halo_jobs.commands.consoles import errors
from halo_jobs.terminal import STOPPED_EXIT_CODE, quieten_libraries, sentence

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: tuple[Callable[..., None], ...] = (
    run.demo,
    run.run,
    run.cancel,
    look.status,
    look.logs,
    look.metrics,
    look.report,
    compare.compare,
    gc.gc,
    data.tokenize,
    weights.convert,
    weights.reshard,
    weights.export,
    weights.verify,
    weights.inspect,
    generate.generate,
    doctor.doctor,
)
for command in _COMMANDS:
    app.command()(command)
app.add_typer(kernels.kernels, name="kernels")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"halo {version('hypenet-megatron')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Convert Qwen3 models into HypeNet hybrids with HALO distillation.

    A quarter of the layers stay softmax attention; the others become recurrent. Start with `halo demo`, then look at
    `halo run RECIPE --dry-run`. `halo --install-completion` sets up completion for your shell.
    """


def main() -> None:
    """Run the command and exit.

    Exit code 0: success. 1: a failure. 2: something the user can correct. 75: a training stopped on request, with its
    state saved. 130: Ctrl-C or SIGTERM. Every code but 0 comes with one sentence on stderr.
    """
    interrupts = InterruptHandler()
    quieten_libraries()
    try:
        app()
    except BaseException as problem:
        # Libraries and typer may have turned the KeyboardInterrupt into another exception.
        if interrupts.requested:
            interrupts.end()
        if isinstance(problem, StopRequested):
            errors.print(
                f"{sentence(problem)}; the same command resumes there", soft_wrap=True, highlight=False
            )
            sys.exit(STOPPED_EXIT_CODE)
        if not isinstance(problem, (ValueError, RuntimeError, OSError)):
            raise
        errors.print(Text.assemble(("error:", "red"), f" {sentence(problem)}"), soft_wrap=True)
        sys.exit(2 if isinstance(problem, ValueError) else 1)


if __name__ == "__main__":
    main()
