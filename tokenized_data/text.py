"""From text files to a token store."""

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
from tokenizers import Tokenizer

from terminal_output import ProgressBar
from tokenized_data.identity import load_tokenizer, load_tokenizer_identity
from tokenized_data.store import TokenStore
from tokenized_data.writer import TokenStoreWriter

SEPARATOR_LINE = "\x00"
SUFFIXES = (".txt", ".jsonl", ".parquet")
Split = Literal["all", "train", "held_out"]
_PIECE_CHARACTERS = 20_000
_PIECES_PER_BATCH = 512
# Before a single space or after a newline, if no further white space follows. Byte-level tokenizers never merge across
# such a place, so the pieces get the tokens of the whole text. A cut within a run of spaces may add a token.
_CLEAN_CUT = re.compile(r"(?<=\S) (?=\S)|(?<=\n)(?=\S)")
_PARQUET_ROWS_PER_BATCH = 256


def text_files(sources: Sequence[Path]) -> list[Path]:
    """The text files in `sources`, searching folders recursively, in a fixed order; ValueError if there are none."""
    files: list[Path] = []
    for source in sources:
        if not source.exists():
            raise ValueError(f"{source} does not exist; correct the path")
        candidates = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
        inside = [path for path in candidates if path.suffix in SUFFIXES]
        if not inside:
            raise ValueError(f"{source} has no {', '.join(SUFFIXES)} files; give a file or folder of text")
        files += inside
    return files


def _lines(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    """(number, line), with a bare newline as the end of line whatever the file uses."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            advance(len(line))
            try:
                # utf-8-sig drops a byte order mark.
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
            text.encode()  # half of a surrogate pair is valid JSON, but cannot be encoded
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeEncodeError):
            raise ValueError(
                f'{path}:{number} is not a JSON object with a "text" string; fix or remove the line'
            ) from None
        yield text


def _parquet_documents(path: Path, advance: Callable[[int], None]) -> Iterator[str]:
    # Imported here because it is large and the processes of a training do not need it.
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
            for batch in file.iter_batches(_PARQUET_ROWS_PER_BATCH, columns=["text"]):
                advance(size * (rows_seen + len(batch)) // rows - size * rows_seen // rows)
                rows_seen += len(batch)
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a readable parquet file ({reason}); download it again") from error


_READERS: dict[str, Callable[[Path, Callable[[int], None]], Iterator[str]]] = {
    ".txt": _txt_documents,
    ".jsonl": _json_documents,
    ".parquet": _parquet_documents,
}


def documents(path: Path, advance: Callable[[int], None]) -> Iterator[str]:
    """The non-empty documents of one file. Calls `advance` with the number of bytes read.

    A .txt file is one document, or several separated by lines that hold a NUL character. A .jsonl file has lines
    {"text": ...}, a .parquet file a string column "text". ValueError names the file and, if it has lines, the line.
    """
    return (text for text in _READERS[path.suffix](path, advance) if text.strip())


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is held out, by a hash of its text, so that all copies of a document are."""
    digest = hashlib.sha256(text.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _pieces(text: str) -> Iterator[str]:
    """Cut long documents between words, because the time and memory to encode a text grow faster than its length."""
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
    """Token ids uint32 of each document, EOS last. Batches span documents, to keep the tokenizer's threads busy."""
    # None marks the end of a document.
    pieces = (piece for text in texts for piece in itertools.chain(_pieces(text), [None]))
    ids: list[np.ndarray] = []
    for batch in itertools.batched(pieces, _PIECES_PER_BATCH):
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
    """Token ids uint32, EOS last, of every document of `files` in `split`. Calls `advance` with the bytes read.

    The ids of a document depend on no other document, so files may be encoded separately.
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
    """Write a store of `encoded`, the documents of `sources` in the order of the files; ValueError if it is empty."""
    provenance: dict[str, Any] = {
        "files": [path.name for path in text_files(sources)],
        "split": split,
        "held_out_share": held_out_share,
    }
    identity = load_tokenizer_identity(tokenizer_folder)
    with TokenStoreWriter(folder, identity, provenance=provenance) as writer:
        empty = True
        for token_ids in encoded:
            writer.add_document(token_ids)
            empty = False
        if empty:
            raise ValueError(
                f"{', '.join(map(str, sources))} has no document for {folder} (split {split}, held-out share "
                f"{held_out_share}); give more text or change the share"
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
    """Encode the documents of `sources`, EOS after each, and write them as a store at `folder`.

    Args:
        sources: .txt, .jsonl and .parquet files, or folders of them.
        tokenizer_folder: folder of a Hugging Face tokenizer.
        split: documents to encode. With the same sources and share, "train" and "held_out" have no document in common.
        held_out_share: share of the documents in "held_out".
        console: where a progress bar is shown if it is a terminal; stderr if None.

    Raises:
        ValueError: a source is missing, unreadable or empty.
    """
    files = text_files(sources)
    total = sum(path.stat().st_size for path in files)
    with ProgressBar(f"tokenizing {folder.name}", total, console, in_bytes=True) as bar:
        encoded = encoded_documents(files, tokenizer_folder, split, held_out_share, bar.advance)
        return write_text_store(folder, encoded, sources, tokenizer_folder, split, held_out_share)
