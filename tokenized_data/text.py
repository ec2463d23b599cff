"""Text files to a token store."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from tokenized_data.identity import load_tokenizer, load_tokenizer_identity
from tokenized_data.store import TokenStore
from tokenized_data.writer import TokenStoreWriter

SEPARATOR_LINE = "\x00"
SUFFIXES = (".txt", ".jsonl", ".parquet")
Split = Literal["all", "train", "held_out"]
_PIECE_CHARACTERS = 20_000
_PIECES_AT_ONCE = 512
# Before a single space or after a newline, where the next thing is no space: byte-level tokenizers never join these,
# so that the pieces get the tokens of the whole. In runs of spaces a cut may cost a token.
_CLEAN_CUT = re.compile(r"(?<=\S) (?=\S)|(?<=\n)(?=\S)")
_PARQUET_ROWS_AT_ONCE = 256


def text_files(sources: Sequence[Path]) -> list[Path]:
    """The text files among `sources`, folders searched through, in a fixed order; ValueError when there are none."""
    files: list[Path] = []
    for source in sources:
        if not source.exists():
            raise ValueError(f"{source} does not exist; correct the path")
        candidates = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
        inside = [path for path in candidates if path.suffix in SUFFIXES]
        if not inside:
            raise ValueError(f"{source} holds no {', '.join(SUFFIXES)} text; give a file or folder that does")
        files += inside
    return files


def _lines(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, ended by a bare newline whatever the file's convention is."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            advance(len(line))
            try:
                # A byte order mark is no text.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number} is not UTF-8 text ({error.reason}); convert the file"
                ) from None
            yield number, text.replace("\r\n", "\n")


def _txt_documents(path: Path, advance: Callable[[int], None]) -> Iterator[str]:
    document: list[str] = []
    for _, line in _lines(path, advance):
        if line.removesuffix("\n") == SEPARATOR_LINE:
            yield "".join(document).removesuffix("\n")
            document = []
        else:
            document.append(line)
    yield "".join(document)


def _json_documents(path: Path, advance: Callable[[int], None]) -> Iterator[str]:
    for number, line in _lines(path, advance):
        if line.isspace():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # half of a surrogate pair is good JSON, but no text
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeEncodeError):
            raise ValueError(
                f'{path}:{number} is not a JSON object with a "text" string; mend or remove the line'
            ) from None
        yield text


def _parquet_documents(path: Path, advance: Callable[[int], None]) -> Iterator[str]:
    # The largest package that is needed at all; every process of a training would load it for nothing.
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    rows_seen = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            if "text" not in schema.names or str(schema.field("text").type) not in ("string", "large_string"):
                columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
                raise ValueError(
                    f"{path} has no string column 'text' but {columns}; rename or convert the column"
                )
            for batch in file.iter_batches(_PARQUET_ROWS_AT_ONCE, columns=["text"]):
                advance(size * (rows_seen + len(batch)) // rows - size * rows_seen // rows)
                rows_seen += len(batch)
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a readable parquet file ({reason}); fetch it again") from error


_READERS: dict[str, Callable[[Path, Callable[[int], None]], Iterator[str]]] = {
    ".txt": _txt_documents,
    ".jsonl": _json_documents,
    ".parquet": _parquet_documents,
}


def documents(path: Path, advance: Callable[[int], None]) -> Iterator[str]:
    """Non-empty documents of one file, one at a time; `advance` is told of bytes as they are read.

    A .txt is one document or several with lines of a NUL character between them, a .jsonl has {"text": ...} lines, a
    .parquet a string column "text". ValueError names the file, and the line where there are lines.
    """
    return (text for text in _READERS[path.suffix](path, advance) if text.strip())


def is_held_out(text: str, share: float) -> bool:
    """Decided by the document's own content, so no copy of a held-out document is trained on."""
    digest = hashlib.sha256(text.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _pieces(text: str) -> Iterator[str]:
    """Cut long documents between words: encoding time grows faster than length, memory too."""
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARACTERS
        if end < len(text):
            middle = start + _PIECE_CHARACTERS // 2
            clean = [match.start() for match in _CLEAN_CUT.finditer(text, middle, end)]
            gap = max(text.rfind("\n", middle, end), text.rfind(" ", middle, end))
            end = clean[-1] if clean else gap if gap > 0 else end
        yield text[start:end]
        start = end


def _encoded(tokenizer: Tokenizer, texts: Iterable[str], eos_id: int) -> Iterator[np.ndarray]:
    """Ids uint32 of each document, EOS last. Pieces of many documents at once keep the tokenizer's threads busy."""
    # None marks the end of a document.
    pieces = (piece for text in texts for piece in itertools.chain(_pieces(text), [None]))
    ids: list[np.ndarray] = []
    for batch in itertools.batched(pieces, _PIECES_AT_ONCE):
        encoded = iter(
            tokenizer.encode_batch_fast([p for p in batch if p is not None], add_special_tokens=False)
        )
        for piece in batch:
            if piece is None:
                yield np.concatenate([*ids, np.array([eos_id], np.uint32)])
                ids = []
            else:
                ids.append(np.asarray(next(encoded).ids, np.uint32))


def encoded_documents(
    files: Iterable[Path],
    tokenizer_folder: Path,
    split: Split,
    held_out_share: float,
    advance: Callable[[int], None] = lambda read: None,
) -> Iterator[np.ndarray]:
    """Ids uint32, EOS last, of every document of `files` that belongs to `split`; `advance` is told of bytes read.

    A document's ids depend on no other document, so files may be encoded apart from each other.
    """
    chosen = (
        text
        for path in files
        for text in documents(path, advance)
        if split == "all" or is_held_out(text, held_out_share) == (split == "held_out")
    )
    eos_id = load_tokenizer_identity(tokenizer_folder).eos_id
    return _encoded(load_tokenizer(tokenizer_folder), chosen, eos_id)


def write_text_store(
    folder: Path,
    encoded: Iterable[np.ndarray],
    sources: Sequence[Path],
    tokenizer_folder: Path,
    split: Split,
    held_out_share: float,
) -> TokenStore:
    """A new store at `folder` of `encoded`, the documents of `sources` in the order of their files."""
    provenance: dict[str, Any] = {
        "files": [path.name for path in text_files(sources)],
        "split": split,
        "held_out_share": held_out_share,
    }
    identity = load_tokenizer_identity(tokenizer_folder)
    with TokenStoreWriter(folder, identity, provenance=provenance) as writer:
        nothing = True
        for token_ids in encoded:
            writer.add_document(token_ids)
            nothing = False
        if nothing:
            raise ValueError(
                f"{', '.join(map(str, sources))} has no document for {folder} (split {split}, held-out share "
                f"{held_out_share}); give more text or another share"
            )
    return TokenStore.open(folder)


def tokenize_text(
    sources: Sequence[Path],
    tokenizer_folder: Path,
    folder: Path,
    *,
    split: Split = "all",
    held_out_share: float = 0.01,
    console: Console | None = None,
) -> TokenStore:
    """Encode the documents of `sources` (or those of one split), EOS after each, into a new store at `folder`.

    `sources`: .txt, .jsonl and .parquet files, or folders of them. With one `held_out_share`, the splits "train" and
    "held_out" of the same sources share no document. The tokenizer's own threads do the work; a bar is shown where
    `console` (default: stderr) is a terminal.
    """
    files = text_files(sources)
    console = console or Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    row = bar.add_task(f"tokenizing {folder.name}", total=sum(path.stat().st_size for path in files))
    with bar:
        encoded = encoded_documents(
            files, tokenizer_folder, split, held_out_share, lambda read: bar.advance(row, read)
        )
        return write_text_store(folder, encoded, sources, tokenizer_folder, split, held_out_share)
