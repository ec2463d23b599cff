"""A training corpus from many text files: shuffled, each paragraph once, some documents held out."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from durable_files import write_json, write_text
from examples.teacher_small.prose import DOCUMENT_SEPARATOR, ParagraphFilter, read_documents

MANIFEST = "corpus.json"  # `halo` copies the sources and licences in it into model cards
SHORTEST_DOCUMENT = 200  # characters
PART_CHARACTERS = 25_000_000

Document = tuple[str, str]  # stem of its text file, text


def collect_documents(text_files: Sequence[Path], caps: Mapping[str, int], seed: int) -> list[Document]:
    """All documents in random order, without paragraphs seen before.

    `caps` limits the characters taken from a file, by the file's stem.
    """
    unseen = ParagraphFilter()
    documents: list[Document] = []
    for path in sorted(text_files, key=lambda path: path.stem):
        for document in read_documents(path):
            text = "\n\n".join(unseen.unseen(document.split("\n\n")))
            if len(text) >= SHORTEST_DOCUMENT:
                documents.append((path.stem, text))
    random.Random(seed).shuffle(documents)
    # Caps apply after shuffling: half a dictionary should be every other page, not A to M.
    left = dict(caps)
    kept = []
    for name, text in documents:
        if name not in left or left[name] >= len(text):
            kept.append((name, text))
            if name in left:
                left[name] -= len(text)
    return kept


def is_held_out(text: str, share: float) -> bool:
    """Depends on the text alone, so a document stays on its side whatever else is in the corpus."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _parts(documents: Sequence[Document]) -> list[list[Document]]:
    parts: list[list[Document]] = [[]]
    length = 0
    for document in documents:
        if parts[-1] and length + len(document[1]) > PART_CHARACTERS:
            parts.append([])
            length = 0
        parts[-1].append(document)
        length += len(document[1])
    return parts


def _tally(documents: Sequence[Document]) -> dict[str, dict[str, int]]:
    characters: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, text in documents:
        characters[name] += len(text)
        counts[name] += 1
    return {name: {"characters": characters[name], "documents": counts[name]} for name in sorted(counts)}


def _write(path: Path, documents: Sequence[Document]) -> None:
    write_text(path, DOCUMENT_SEPARATOR.join(text for _, text in documents) + "\n")


def write_corpus(
    text_files: Sequence[Path],
    out_folder: Path,
    *,
    characters: int,
    caps: Mapping[str, int],
    provenance: Mapping[str, Mapping[str, Any]],
    held_out_share: float = 0.01,
    seed: int = 1,
) -> dict[str, Any]:
    """Write prose/prose-NN.txt, prose/corpus.json and held_out/prose.txt; return what corpus.json holds.

    Training text is cut after `characters`. It is shuffled first, so every source shrinks alike. `provenance` gives
    what is known about a source (package, version, licence), by the stem of its text file.
    """
    documents = collect_documents(text_files, caps, seed)
    held_out = [document for document in documents if is_held_out(document[1], held_out_share)]
    train = []
    left = characters
    for document in documents:
        if not is_held_out(document[1], held_out_share):
            left -= len(document[1])
            if left < 0:
                break
            train.append(document)
    prose = out_folder / "prose"
    _write(out_folder / "held_out" / "prose.txt", held_out)
    for number, part in enumerate(_parts(train)):
        _write(prose / f"prose-{number:02d}.txt", part)
    held_out_tally = _tally(held_out)
    manifest = {
        "characters": sum(len(text) for _, text in train),
        "documents": len(train),
        "sources": {
            name: {**provenance.get(name, {}), "train": tally, "held_out": held_out_tally.get(name, {})}
            for name, tally in _tally(train).items()
        },
    }
    write_json(prose / MANIFEST, manifest)
    return manifest
