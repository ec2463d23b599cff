"""halo doctor: is this machine ready, and the folder that runs are kept in?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from halo_jobs.commands.consoles import console


def doctor(
    folder: Annotated[
        Path, typer.Option("--folder", help="The folder that runs are kept in, shared by all nodes of a cluster.")
    ] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
) -> None:
    """Check the software, GPUs and schedulers of this machine, and the file system of a folder.

    Each line says ok or what to do. Exit code 1 if something required is missing; optional parts do not count.
    Takes a few seconds and leaves nothing behind. Run it on a compute node too, for example with
    `srun halo doctor --folder /shared/runs`.

    --json prints an object with `ready` (true or false) and `checks`, a list of objects with `name`, `found`, `ok`,
    `required` and `advice`.
    """
    from halo_jobs.doctor import check_folder, check_software

    checks = [*check_software(), *check_folder(folder)]
    failed = [check.name for check in checks if check.required and not check.ok]
    if as_json:
        print(json.dumps({"ready": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            style, word = ("green", "ok") if check.ok else ("red", "fix") if check.required else ("yellow", "note")
            line = f"  {check.name:<{width}}  {check.found}" + (f"; {check.advice}" if check.advice else "")
            console.print(Text.assemble((f"{word:<4}", style), line), soft_wrap=True)
    if failed:
        raise RuntimeError(f"{', '.join(failed)}: not ready; the lines above say what to do")
