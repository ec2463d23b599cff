"""Writes a token store: a zarr v3 group, streamed shard by shard, published whole.

Shards are uncompressed so that readers can memory-map them (reading windows through zarr itself is two orders of
magnitude slower); the shard index carries a crc32c and the group's attributes a SHA-256 per shard.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from durable_files import discard_leftovers, publish_folder, sha256_file, temporary_sibling
from tokenized_data.identity import TokenizerIdentity

FORMAT = "hypenet-token-store/1"
INNER_CHUNK = 16_384
SHARD_TOKENS = 16 * 2**20


class _ShardedArray:
    """One 1-D array that grows a shard at a time."""

    def __init__(self, group: zarr.Group, name: str, dtype: Any, shard_length: int):
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
            config={
                "write_empty_chunks": True
            },  # a chunk of zeros is data here, and a mapped shard has no gaps
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
        if self._filled:
            start = self._array.shape[0]
            self._array.resize((start + self._filled,))
            self._array[start:] = self._buffer[: self._filled]
            self._filled = 0


class TokenStoreWriter:
    """Context manager; the store appears at `folder` when the block ends without an error, or not at all."""

    def __init__(
        self,
        folder: Path,
        tokenizer: TokenizerIdentity,
        *,
        provenance: dict[str, Any],
        loss_weights: bool = False,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        if shard_tokens % INNER_CHUNK:
            raise ValueError(f"shard_tokens {shard_tokens} is not a multiple of {INNER_CHUNK}")
        self.folder = folder
        self._tokenizer = tokenizer
        self._provenance = provenance
        self._offsets = [0]
        discard_leftovers(folder.parent)
        self._temporary = temporary_sibling(folder)
        self._group = zarr.open_group(self._temporary, mode="w", zarr_format=3)
        self._tokens = _ShardedArray(self._group, "tokens", np.uint32, shard_tokens)
        self._weights = (
            _ShardedArray(self._group, "loss_weights", np.uint8, shard_tokens) if loss_weights else None
        )

    def __enter__(self) -> TokenStoreWriter:
        return self

    def add_document(self, token_ids: np.ndarray, loss_weights: np.ndarray | None = None) -> None:
        """Append one document, EOS included by the caller: ids [n] and, in a weighted store, uint8 weights [n]."""
        if len(token_ids) and int(np.max(token_ids)) >= self._tokenizer.vocab_size:
            raise ValueError(
                f"token id {int(np.max(token_ids))} is outside the vocabulary of {self._tokenizer.describe()}; "
                "encode with that tokenizer"
            )
        self._tokens.append(np.asarray(token_ids, np.uint32))
        if self._weights is not None:
            assert loss_weights is not None and len(loss_weights) == len(token_ids)
            self._weights.append(np.asarray(loss_weights, np.uint8))
        self._offsets.append(self._offsets[-1] + len(token_ids))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _finish(self) -> None:
        arrays = ["tokens"]
        self._tokens.flush()
        if self._weights is not None:
            self._weights.flush()
            arrays.append("loss_weights")
        self._group.create_array("document_offsets", data=np.asarray(self._offsets, np.int64))
        shards = {
            str(path.relative_to(self._temporary)): sha256_file(path)
            for name in arrays
            for path in sorted((self._temporary / name / "c").glob("*"))
        }
        self._group.attrs.update(
            {
                "format": FORMAT,
                "tokenizer": vars(self._tokenizer),
                "num_tokens": self._offsets[-1],
                "shard_sha256": shards,
                "provenance": self._provenance,
            }
        )
        publish_folder(self._temporary, self.folder)
