"""Reads a token store at memory speed: shards are checked when it is opened, then memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr

from durable_files import sha256_file
from tokenized_data.identity import TokenizerIdentity
from tokenized_data.writer import FORMAT, INNER_CHUNK

_INDEX_ENTRY = 16  # two little-endian uint64 per inner chunk: offset, length
_CRC = 4


def _map_shard(path: Path, dtype: np.dtype[Any], shard_length: int, used: int) -> np.ndarray:
    """The first `used` values of a shard file as a read-only map, after checking its size and its index."""
    mend = "the store is damaged: delete it and tokenize again"
    inner_bytes = INNER_CHUNK * dtype.itemsize
    index_bytes = _INDEX_ENTRY * (shard_length // INNER_CHUNK) + _CRC
    written = -(-used // INNER_CHUNK)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {mend}") from None
    if size < written * inner_bytes + index_bytes:
        raise ValueError(f"{path} is truncated to {size} bytes; {mend}")
    with open(path, "rb") as handle:
        handle.seek(size - index_bytes)
        index = handle.read()
    if int.from_bytes(index[-_CRC:], "little") != google_crc32c.value(index[:-_CRC]):
        raise ValueError(f"{path} has a shard index that does not match its checksum; {mend}")
    entries = np.frombuffer(index[:-_CRC], "<u8").reshape(-1, 2)[:written]
    in_place = np.arange(written, dtype=np.uint64) * inner_bytes
    if not np.array_equal(entries[:, 0], in_place) or (entries[:, 1] != inner_bytes).any():
        raise ValueError(f"{path} is not laid out as this program writes shards; tokenize again")
    return np.memmap(path, dtype=dtype, mode="r", shape=(used,))


@dataclass(frozen=True)
class _MappedArray:
    """A sharded 1-D array as one address range."""

    shard_length: int
    shards: list[np.ndarray]

    @classmethod
    def open(cls, folder: Path, array: zarr.Array, length: int) -> _MappedArray:
        shard_length = array.metadata.chunk_grid.chunk_shape[0]  # type: ignore[union-attr]
        dtype = np.dtype(array.dtype).newbyteorder("<")
        starts = range(0, length, shard_length)
        return cls(
            shard_length,
            [
                _map_shard(folder / "c" / str(n), dtype, shard_length, min(shard_length, length - start))
                for n, start in enumerate(starts)
            ],
        )

    def read(self, start: int, length: int) -> np.ndarray:
        parts = []
        while length > 0:
            shard, offset = divmod(start, self.shard_length)
            part = self.shards[shard][offset : offset + length]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return np.concatenate(parts)


@dataclass(frozen=True)
class TokenStore:
    """A finished store. `document_offsets` is int64 [documents + 1]; `digest` identifies the content."""

    folder: Path
    tokenizer: TokenizerIdentity
    num_tokens: int
    document_offsets: np.ndarray
    digest: str
    provenance: dict[str, Any]
    _tokens: _MappedArray = field(repr=False)
    _weights: _MappedArray | None = field(repr=False)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        expected_tokenizer: TokenizerIdentity | None = None,
        verify_content: bool = False,
    ) -> TokenStore:
        """Open and check; ValueError names the store and the mend when it is not one, damaged, or of another tokenizer.

        Shard sizes and indexes are always checked, their whole content with `verify_content`.
        """
        try:
            group = zarr.open_group(folder, mode="r", zarr_format=3)
            attributes = dict(group.attrs)
            array = group["tokens"]
        except (FileNotFoundError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder} is not a token store; make one by tokenizing text") from error
        if attributes.get("format") != FORMAT:
            raise ValueError(f"{folder} is not a token store of format {FORMAT}; tokenize the text again")
        tokenizer = TokenizerIdentity(**attributes["tokenizer"])  # type: ignore[arg-type]
        if expected_tokenizer is not None and expected_tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(
                f"{folder} was made with the tokenizer {tokenizer.describe()}, not {expected_tokenizer.describe()}; "
                "tokenize the text again with the model's own"
            )
        num_tokens = int(attributes["num_tokens"])  # type: ignore[arg-type]
        checksums: dict[str, str] = attributes["shard_sha256"]  # type: ignore[assignment]
        weights = group.get("loss_weights")
        store = cls(
            folder,
            tokenizer,
            num_tokens,
            np.asarray(group["document_offsets"]),
            hashlib.sha256(json.dumps([vars(tokenizer), checksums], sort_keys=True).encode()).hexdigest(),
            attributes["provenance"],  # type: ignore[arg-type]
            _MappedArray.open(folder / "tokens", array, num_tokens),  # type: ignore[arg-type]
            _MappedArray.open(folder / "loss_weights", weights, num_tokens) if weights is not None else None,  # type: ignore[arg-type]
        )
        if verify_content:
            for problem in _content_problems(folder, checksums):
                raise ValueError(problem)
        return store

    @property
    def has_loss_weights(self) -> bool:
        return self._weights is not None

    def read(self, start: int, length: int) -> np.ndarray:
        """Token ids uint32 [length] from position `start`."""
        return self._tokens.read(start, length)

    def read_loss_weights(self, start: int, length: int) -> np.ndarray:
        """Loss weights uint8 [length]; ones in a store without any."""
        return self._weights.read(start, length) if self._weights is not None else np.ones(length, np.uint8)


def _content_problems(folder: Path, checksums: dict[str, str]) -> Iterator[str]:
    for name, checksum in checksums.items():
        if sha256_file(folder / name) != checksum:
            yield f"{folder / name} does not match its checksum; the store is damaged: delete it and tokenize again"
