"""halo generate: text from an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    source: Annotated[Path, typer.Argument(help="A finished run's folder, or a Hugging Face model folder.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue, or with --chat the user's message.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template and print only the reply.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Stop after this many tokens.")
    ] = 100,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            min=0.0,
            help="Sampling temperature; 0 takes the most likely token. Default: the model's generation_config.json.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run modelling code from the folder that is not this package's. Read it first."
        ),
    ] = False,
) -> None:
    """Continue a prompt with an exported model and print the text as it is generated.

    Reads HypeNet exports and plain Qwen3 folders. Modelling code that comes with a folder is not run, unless you add
    --trust-remote-code: exports of this version load with the package's own copy of it.

    Example: halo generate runs/demo "The state of the Union is"
    """
    from halo_jobs.release_sources import model_folder

    folder = model_folder(source)
    from halo_jobs.generation import load_model, stream_text

    model, tokenizer = load_model(folder, trust_remote_code=trust_remote_code)
    stream_text(
        model,
        tokenizer,
        prompt,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
