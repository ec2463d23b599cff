"""Text files to a token store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from tokenized_data.identity import load_tokenizer_identity
from tokenized_data.store import TokenStore
from tokenized_data.writer import TokenStoreWriter

DOCUMENT_SEPARATOR = "\n\x00\n"
SUFFIXES = (".txt", ".jsonl", ".parquet")
Split = Literal["all", "train", "held_out"]
_PIECE_CHARACTERS = 20_000
_PIECES_AT_ONCE = 512


def text_files(sources: Sequence[Path]) -> list[Path]:
    """The text files among `sources`, folders searched through, in a fixed order; ValueError when there are none."""
    files: list[Path] = []
    for source in sources:
        if not source.exists():
            raise ValueError(f"{source} does not exist; correct the path in the recipe")
        inside = (
            [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix in SUFFIXES)
        )
        if not inside or inside[0].suffix not in SUFFIXES:
            raise ValueError(f"{source} holds no {', '.join(SUFFIXES)} text; give a file or folder that does")
        files += inside
    return files


def _json_documents(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f'{path}:{number} is not a JSON object with a "text"; mend or remove it'
                ) from None


def _parquet_documents(path: Path) -> Iterator[str]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}); fetch it again") from None
    if "text" not in file.schema_arrow.names:
        raise ValueError(
            f"{path} has no column 'text' but {', '.join(file.schema_arrow.names)}; rename the column"
        )
    for batch in file.iter_batches(batch_size=256, columns=["text"]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def documents(path: Path) -> Iterator[str]:
    """Non-empty documents of one file; a .txt is one document or several around lines of a NUL character."""
    if path.suffix == ".txt":
        try:
            parts: Iterator[str] = iter(path.read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
            ) from None
    else:
        parts = _json_documents(path) if path.suffix == ".jsonl" else _parquet_documents(path)
    return (text for text in parts if text.strip())


def is_held_out(text: str, share: float) -> bool:
    """Decided by the document's own content, so no copy of a held-out document is trained on."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def _pieces(text: str) -> list[str]:
    """Cut long documents at line ends or spaces: encoding time grows faster than length, memory too."""
    pieces = []
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARACTERS
        if end < len(text):
            cut = max(text.rfind("\n", start + 1, end), text.rfind(" ", start + 1, end))
            end = cut if cut > start else end
        pieces.append(text[start:end])
        start = end
    return pieces


class _Encoder:
    """Encodes documents in batches over the tokenizer's own threads and hands them to the writer in order."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int, writer: TokenStoreWriter):
        self._tokenizer, self._eos, self._writer = tokenizer, np.array([eos_id]), writer
        self._waiting: list[list[str]] = []
        self._count = 0

    def add(self, text: str) -> None:
        self._waiting.append(_pieces(text))
        self._count += len(self._waiting[-1])
        if self._count >= _PIECES_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        flat = [piece for document in self._waiting for piece in document]
        encoded = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        for document in self._waiting:
            ids = [np.asarray(next(encoded).ids, np.uint32) for _ in document]
            self._writer.add_document(np.concatenate([*ids, self._eos]))
        self._waiting, self._count = [], 0


def tokenize_text(
    sources: Sequence[Path],
    tokenizer_folder: Path,
    folder: Path,
    *,
    split: Split = "all",
    held_out_share: float = 0.01,
    console: Console | None = None,
) -> TokenStore:
    """Encode every document of `sources` (or those of one split), EOS after each, into a new store at `folder`."""
    files = text_files(sources)
    identity = load_tokenizer_identity(tokenizer_folder)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    provenance: dict[str, Any] = {
        "files": [path.name for path in files],
        "split": split,
        "held_out_share": held_out_share,
    }
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console is None or not console.is_terminal,
    )
    with TokenStoreWriter(folder, identity, provenance=provenance) as writer, bar:
        task = bar.add_task(f"tokenizing {folder.name}", total=sum(path.stat().st_size for path in files))
        encoder = _Encoder(tokenizer, identity.eos_id, writer)
        for path in files:
            for text in documents(path):
                if split == "all" or is_held_out(text, held_out_share) == (split == "held_out"):
                    encoder.add(text)
            encoder.flush()
            bar.advance(task, path.stat().st_size)
    return TokenStore.open(folder)
