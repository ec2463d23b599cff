"""Writes a token store: a zarr v3 group, streamed shard by shard and published atomically.

Shards are uncompressed so that readers can memory-map them, which is two orders of magnitude faster than reading
windows through zarr. A shard index has a crc32c, and the attributes of the group have a SHA-256 per shard.
"""

from __future__ import annotations

import glob
import shutil
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import LocalStore

from durable_files import (
    TEMPORARY_MARK,
    ProcessIdentity,
    publish_folder,
    read_json,
    sha256_file,
    temporary_sibling,
    write_json,
)
from tokenized_data.identity import TokenizerIdentity

FORMAT = "hypenet-token-store/1"
INNER_CHUNK = 16_384
SHARD_TOKENS = 16 * 2**20
OWNER_FILE = "owner.json"  # of an unfinished store: the process that writes it


@contextmanager
def _errors_name(folder: Path) -> Iterator[None]:
    """Let an OSError without a file name (such as that of a full disk) name `folder`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise


def _discard_dead_siblings(folder: Path) -> None:
    """Remove what killed writers of `folder` left beside it. The folder of a live writer stays.

    A writer of another host cannot be observed; what it left is removed with the other leftovers of its stage.
    """
    for leftover in folder.parent.glob(f"{glob.escape(folder.name)}{TEMPORARY_MARK}*"):
        with suppress(OSError, ValueError):
            if ProcessIdentity.from_json(read_json(leftover / OWNER_FILE)).has_ended():
                shutil.rmtree(leftover, ignore_errors=True)


class _OneWriterStore(LocalStore):
    """A zarr store with a single writer. zarr would create metadata by hard link, which some file systems refuse."""

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if not await self.exists(key):
            await self.set(key, value)


class _ShardedArray:
    """A 1-D array that grows by one shard at a time. `checksums` has the SHA-256 of each shard by path."""

    def __init__(self, folder: Path, group: zarr.Group, name: str, dtype: Any, shard_length: int) -> None:
        self.checksums: dict[str, str] = {}
        self._folder, self._name = folder, name
        self._buffer = np.empty(shard_length, dtype)
        self._filled = 0
        self._array = group.create_array(
            name,
            shape=(0,),
            chunks=(shard_length,),
            dtype=dtype,
            serializer=ShardingCodec(
                chunk_shape=(INNER_CHUNK,), codecs=[BytesCodec()], index_codecs=[BytesCodec(), Crc32cCodec()]
            ),
            compressors=None,
            filters=None,
            fill_value=0,
            # By default zarr skips chunks of zeros, but a mapped shard must have no gaps.
            config={"write_empty_chunks": True},
        )

    def append(self, values: np.ndarray) -> None:
        while len(values):
            count = min(len(values), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + count] = values[:count]
            self._filled += count
            values = values[count:]
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        """Write the buffer as the next shard. All shards but the last are full."""
        if self._filled:
            start = self._array.shape[0]
            self._array.resize((start + self._filled,))
            self._array[start:] = self._buffer[: self._filled]
            self._filled = 0
            file = f"{self._name}/c/{len(self.checksums)}"
            self.checksums[file] = sha256_file(self._folder / file)


class TokenStoreWriter:
    """Context manager; the store appears at `folder` when the block ends without an error, or not at all.

    Memory holds one shard per array. A killed writer leaves a temporary sibling of `folder`, which the next writer of
    the same store removes. Each sibling names the process that writes it, so that a live writer is left alone. OSErrors
    (disk full, read-only) name `folder`.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: TokenizerIdentity,
        *,
        provenance: dict[str, Any],
        loss_weights: bool = False,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        if shard_tokens < 1 or shard_tokens % INNER_CHUNK:
            raise ValueError(f"shard_tokens {shard_tokens} is not a multiple of {INNER_CHUNK}; round it up")
        self.folder = folder
        self._tokenizer = tokenizer
        self._provenance = provenance
        self._has_weights = loss_weights
        self._shard_tokens = shard_tokens
        self._offsets = array("q", [0])

    def __enter__(self) -> TokenStoreWriter:
        self._temporary = temporary_sibling(self.folder)
        try:
            with _errors_name(self.folder):
                _discard_dead_siblings(self.folder)
                self._temporary.mkdir(parents=True)
                write_json(self._temporary / OWNER_FILE, asdict(ProcessIdentity.current()))
                self._group = zarr.open_group(_OneWriterStore(self._temporary), mode="a", zarr_format=3)
                self._tokens = self._new_array("tokens", np.uint32)
                self._weights = self._new_array("loss_weights", np.uint8) if self._has_weights else None
        except BaseException:
            self._discard()
            raise
        return self

    def _new_array(self, name: str, dtype: Any) -> _ShardedArray:
        return _ShardedArray(self._temporary, self._group, name, dtype, self._shard_tokens)

    def _discard(self) -> None:
        # When one write of zarr fails, others still run in its threads and may create files in a removed folder.
        for pause in (0, 0.05, 0.2, 0.5):
            time.sleep(pause)
            shutil.rmtree(self._temporary, ignore_errors=True)
            if not self._temporary.exists():
                break

    def add_document(self, token_ids: np.ndarray, loss_weights: np.ndarray | None = None) -> None:
        """Append one document that ends with EOS: ids [n] and, in a store with loss weights, uint8 weights [n].

        Raises ValueError for ids outside the vocabulary, and for missing, superfluous or too few weights.
        """
        if (
            len(token_ids)
            and not 0 <= int(np.min(token_ids)) <= int(np.max(token_ids)) < self._tokenizer.vocab_size
        ):
            raise ValueError(
                f"{self.folder}: token ids {np.min(token_ids)} to {np.max(token_ids)} of a document are not all in the "
                f"vocabulary of {self._tokenizer.describe()}; encode with that tokenizer"
            )
        if (loss_weights is None) == self._has_weights or (
            loss_weights is not None and len(loss_weights) != len(token_ids)
        ):
            wanted = "one loss weight per token" if self._has_weights else "no loss weights"
            raise ValueError(
                f"{self.folder} takes {wanted}; pass the document that way, or change loss_weights of the writer"
            )
        with _errors_name(self.folder):
            self._tokens.append(np.asarray(token_ids, np.uint32))
            if self._weights is not None:
                self._weights.append(np.asarray(loss_weights, np.uint8))
        self._offsets.append(self._offsets[-1] + len(token_ids))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _errors_name(self.folder):
                    self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        checksums: dict[str, str] = {}
        for sharded in [self._tokens, *([self._weights] if self._weights is not None else [])]:
            sharded.flush()
            checksums |= sharded.checksums
        # Uncompressed, so that its checksum depends on the content only.
        offsets = np.frombuffer(self._offsets, np.int64)
        self._group.create_array("document_offsets", data=offsets, chunks=offsets.shape, compressors=None)
        checksums["document_offsets/c/0"] = sha256_file(self._temporary / "document_offsets/c/0")
        self._group.attrs.update(
            {
                "format": FORMAT,
                "tokenizer": vars(self._tokenizer),
                "num_tokens": self._offsets[-1],
                "shard_sha256": checksums,
                "provenance": self._provenance,
            }
        )
        (self._temporary / OWNER_FILE).unlink()
        publish_folder(self._temporary, self.folder)
