"""The `halo` command. Every subcommand is thin: it calls a function that a notebook could call too."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer
from rich.text import Text

from halo_cluster import StopRequested
from halo_jobs.commands import data, kernels, look, run, weights
from halo_jobs.commands.consoles import errors
from halo_jobs.terminal import STOPPED_EXIT_CODE, Interruption, quieten_libraries, sentence

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn Qwen3 models into HypeNet hybrids (a quarter softmax attention, three quarters recurrent) by HALO "
    "distillation. Start with `halo demo`; then `halo run RECIPE --dry-run`.",
)
_COMMANDS: tuple[Callable[..., None], ...] = (
    run.demo,
    run.run,
    run.cancel,
    look.status,
    look.logs,
    look.metrics,
    look.report,
    data.tokenize,
    weights.convert,
    weights.reshard,
    weights.export,
    weights.verify,
    weights.inspect,
)
for command in _COMMANDS:
    app.command()(command)
app.add_typer(kernels.kernels, name="kernels")


def main() -> None:
    """Entry point: 0, or one sentence on stderr and 2 for user errors, 1 for failures, 130 for Ctrl-C and SIGTERM,
    75 for a training that was asked to stop and has saved."""
    interruption = Interruption()
    quieten_libraries()
    try:
        app()
    except BaseException as problem:
        # Whatever libraries and typer have made of the KeyboardInterrupt by now.
        if interruption.requested:
            interruption.end()
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
