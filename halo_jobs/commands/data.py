"""halo tokenize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halo_jobs.commands.consoles import console


def tokenize(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Files or folders of .txt, .jsonl ({'text': ...} lines) or .parquet text."),
    ],
    tokenizer: Annotated[
        Path,
        typer.Option("--tokenizer", help="Folder with tokenizer.json, such as a Hugging Face model's."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the store to; must not exist.")],
) -> None:
    """Tokenize text into a store (zarr v3). `halo run` does this itself for the corpus of a recipe."""
    from tokenized_data import tokenize_text

    if out.exists():
        raise ValueError(f"{out} already exists; remove it or choose another --out")
    store = tokenize_text(sources, tokenizer, out)
    documents = len(store.document_offsets) - 1
    console.print(
        f"{store.num_tokens:,} tokens in {documents:,} documents: {out}", soft_wrap=True, highlight=False
    )
