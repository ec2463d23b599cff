"""Many text files into one shuffled stream of whole documents, small enough to carry to another machine."""

from __future__ import annotations

import hashlib
import lzma
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from durable_files import read_json, sha256_file, write_bytes, write_json
from examples.teacher_small.prose import DOCUMENT_SEPARATOR, ParagraphFilter, read_documents

MANIFEST = "corpus.json"
HELD_OUT_FILE = "prose-heldout.txt.xz"
SHORTEST_DOCUMENT = 200  # characters
PART_CHARACTERS = 25_000_000
# A dictionary as large as a part: the documents of one package lie anywhere in it.
_COMPRESSION = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 32 << 20}]

Document = tuple[str, str]  # name of the text file it came from, text


def collect_documents(text_files: Sequence[Path], caps: Mapping[str, int], seed: int) -> list[Document]:
    """All documents, shuffled, each paragraph once over all files; `caps`: most characters of a file, by its stem."""
    unseen = ParagraphFilter()
    documents: list[Document] = []
    for path in sorted(text_files, key=lambda path: path.stem):
        for document in read_documents(path):
            text = "\n\n".join(unseen.unseen(document.split("\n\n")))
            if len(text) >= SHORTEST_DOCUMENT:
                documents.append((path.stem, text))
    random.Random(seed).shuffle(documents)
    # Capped after shuffling: half a dictionary is every other page of it, not A to M.
    left = dict(caps)
    kept = []
    for name, text in documents:
        if name not in left or left[name] >= len(text):
            kept.append((name, text))
            if name in left:
                left[name] -= len(text)
    return kept


def is_held_out(text: str, share: float) -> bool:
    """Decided by the text alone, so that a document stays on its side whatever else is packed."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _write_part(path: Path, documents: Sequence[Document]) -> dict[str, Any]:
    content = (DOCUMENT_SEPARATOR.join(text for _, text in documents) + "\n").encode()
    write_bytes(path, lzma.compress(content, format=lzma.FORMAT_XZ, filters=_COMPRESSION))
    return {
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "characters": sum(len(text) for _, text in documents),
        "documents": len(documents),
    }


def _split(documents: Sequence[Document]) -> list[list[Document]]:
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


def pack_prose(
    text_files: Sequence[Path],
    out_folder: Path,
    *,
    characters: int,
    caps: Mapping[str, int],
    provenance: Mapping[str, Mapping[str, Any]],
    held_out_share: float = 0.01,
    seed: int = 1,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write prose-NN.txt.xz (at most `characters` in all), the held-out file and corpus.json; returns the latter.

    Whole documents are shuffled and the stream is cut after `characters`, so every source shrinks alike.
    `provenance`: by stem of a text file what is known of its origin (package, version, licence).
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
    files = {HELD_OUT_FILE: _write_part(out_folder / HELD_OUT_FILE, held_out)}
    for number, part in enumerate(_split(train)):
        name = f"prose-{number:02d}.txt.xz"
        files[name] = _write_part(out_folder / name, part)
        progress(f"{name}: {files[name]['characters']:,} characters in {files[name]['bytes']:,} bytes")
    sources = {
        name: {**provenance.get(name, {}), "train": tally, "held_out": _tally(held_out).get(name, {})}
        for name, tally in _tally(train).items()
    }
    manifest = {
        "characters": sum(len(text) for _, text in train),
        "documents": len(train),
        "files": files,
        "sources": sources,
    }
    write_json(out_folder / MANIFEST, manifest)
    return manifest


def unpack_prose(packed_folder: Path, out_folder: Path) -> list[Path]:
    """Check and decompress what pack_prose wrote; returns the training files, the held-out file last."""
    files: dict[str, dict[str, Any]] = read_json(packed_folder / MANIFEST)["files"]
    unpacked = []
    for name in sorted(files, key=lambda name: (name == HELD_OUT_FILE, name)):
        packed = packed_folder / name
        if not packed.is_file() or sha256_file(packed) != files[name]["sha256"]:
            raise ValueError(f"{packed} is missing or differs from {MANIFEST}; pack the text again.")
        target = out_folder / name.removesuffix(".xz")
        write_bytes(target, lzma.decompress(packed.read_bytes()))
        unpacked.append(target)
    return unpacked
