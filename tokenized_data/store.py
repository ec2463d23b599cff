"""Reads a token store at memory speed: opening it checks the shards and maps them into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from durable_files import sha256_file
from tokenized_data.identity import TokenizerIdentity
from tokenized_data.writer import FORMAT

_INDEX_ENTRY = 16  # two little-endian uint64 per inner chunk: offset, length
_CRC = 4
_ABSENT = 2**64 - 1  # offset and length of an inner chunk that was not written
_MAX_MAPS = 256  # each holds a file descriptor; the usual limit is 1,024 per process
_FIX = "the store is damaged: delete it and tokenize again"


def _shard_index(path: Path, inner_chunks: int, plain_bytes: int) -> np.ndarray:
    """Offsets and lengths, uint64 [inner_chunks, 2], from the end of a shard; ValueError if the shard is damaged.

    `plain_bytes` is the expected size of the shard if it is uncompressed, otherwise 0.
    """
    index_bytes = _INDEX_ENTRY * inner_chunks + _CRC
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {_FIX}") from None
    with open(path, "rb") as handle:
        handle.seek(max(0, size - index_bytes))
        index = handle.read()
    crc_matches = int.from_bytes(index[-_CRC:], "little") == google_crc32c.value(index[:-_CRC])
    if size < index_bytes or (not crc_matches and size < plain_bytes):
        raise ValueError(f"{path} is truncated to {size} bytes; {_FIX}")
    if not crc_matches:
        raise ValueError(f"{path} has a shard index that does not match its checksum; {_FIX}")
    entries = np.frombuffer(index[:-_CRC], "<u8").reshape(-1, 2)
    ends = entries[entries[:, 0] != _ABSENT].sum(axis=1)
    if len(ends) and int(ends.max()) > size - index_bytes:
        raise ValueError(f"{path} has {size} bytes, fewer than its index refers to; {_FIX}")
    return entries


class _MappedShards:
    """A sharded 1-D array whose shard files begin with the values, without gaps."""

    def __init__(self, paths: Sequence[Path], dtype: np.dtype[Any], shard_length: int, length: int) -> None:
        self._paths, self._dtype = paths, dtype
        self._shard_length, self._length = shard_length, length
        self._shard = lru_cache(_MAX_MAPS)(self._map)

    def _map(self, shard: int) -> np.ndarray:
        used = min(self._shard_length, self._length - shard * self._shard_length)
        return np.memmap(self._paths[shard], dtype=self._dtype, mode="r", shape=(used,))

    def read(self, start: int, length: int) -> np.ndarray:
        result = np.empty(length, self._dtype)
        done = 0
        while done < length:
            shard, offset = divmod(start + done, self._shard_length)
            part = self._shard(shard)[offset : offset + length - done]
            result[done : done + len(part)] = part
            done += len(part)
        return result


@dataclass(frozen=True)
class _ZarrArray:
    """An array in any other layout that zarr can read, such as compressed shards. Much slower."""

    array: zarr.Array[Any]

    def read(self, start: int, length: int) -> np.ndarray:
        return np.asarray(self.array[start : start + length])


_Readable = _MappedShards | _ZarrArray


def _indexed_sharding(codecs: Sequence[Any]) -> ShardingCodec | None:
    """The sharding codec, if shards end with an index and its crc32c."""
    if len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
        return None
    location = codecs[0].index_location
    at_end = getattr(location, "value", location) == "end"  # an enumeration before zarr 3.4
    return codecs[0] if at_end and codecs[0].index_codecs == (BytesCodec(), Crc32cCodec()) else None


def _open_array(folder: Path, array: zarr.Array[Any]) -> _Readable:
    """Check every shard file of the array in `folder`. Map the files if they are uncompressed and without gaps."""
    metadata: Any = array.metadata  # of zarr version 3
    (length,) = array.shape
    (shard_length,), (inner_chunk,) = array.shards or array.chunks, array.chunks
    starts = range(0, length, shard_length)
    paths = [folder / metadata.encode_chunk_key((number,)) for number in range(len(starts))]
    sharding = _indexed_sharding(metadata.codecs)
    if sharding is None:
        for path in paths:  # zarr reads a missing chunk as zeros
            if not path.is_file():
                raise ValueError(f"{path} is missing; {_FIX}")
        return _ZarrArray(array)
    dtype = np.dtype(array.dtype).newbyteorder("<")
    plain = sharding.codecs in [(BytesCodec(),), (BytesCodec(endian=None),)]
    inner_bytes = inner_chunk * dtype.itemsize
    inner_chunks = shard_length // inner_chunk
    in_place = plain
    for path, start in zip(paths, starts, strict=True):
        written = -(-min(shard_length, length - start) // inner_chunk)
        whole = written * inner_bytes + _INDEX_ENTRY * inner_chunks + _CRC
        entries = _shard_index(path, inner_chunks, whole if plain else 0)[:written]
        offsets = np.arange(written, dtype=np.uint64) * inner_bytes
        in_place &= bool(np.array_equal(entries[:, 0], offsets) and (entries[:, 1] == inner_bytes).all())
    return _MappedShards(paths, dtype, shard_length, length) if in_place else _ZarrArray(array)


@dataclass(frozen=True)
class TokenStore:
    """A finished store. `document_offsets` is int64 [documents + 1], `digest` identifies tokenizer and content."""

    folder: Path
    tokenizer: TokenizerIdentity
    num_tokens: int
    document_offsets: np.ndarray
    digest: str
    provenance: dict[str, Any]
    _tokens: _Readable = field(repr=False)
    _weights: _Readable | None = field(repr=False)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        expected_tokenizer: TokenizerIdentity | None = None,
        verify_content: bool = False,
    ) -> TokenStore:
        """Open and check a store: sizes and indexes of all shards, and their whole content with `verify_content`.

        Raises ValueError if `folder` is no store, is damaged, or was made with another tokenizer than
        `expected_tokenizer`.
        """
        attributes, arrays = _read_metadata(folder)
        tokenizer = TokenizerIdentity(**attributes["tokenizer"])
        if expected_tokenizer is not None and expected_tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(
                f"{folder} was made with the tokenizer {tokenizer.describe()}, not {expected_tokenizer.describe()}; "
                "tokenize the text again with the tokenizer of the model"
            )
        num_tokens, checksums = attributes["num_tokens"], attributes["shard_sha256"]
        lengths = {arrays[name].shape[0] for name in ("tokens", "loss_weights") if name in arrays}
        offsets = np.asarray(arrays["document_offsets"][:])
        if lengths != {num_tokens} or not _are_offsets(offsets, num_tokens):
            raise ValueError(f"{folder} has arrays that do not match its {num_tokens:,} tokens; {_FIX}")
        readable = {
            name: _open_array(folder / name, arrays[name])
            for name in ("tokens", "loss_weights")
            if name in arrays
        }
        if verify_content:
            for name, checksum in checksums.items():
                if sha256_file(folder / name) != checksum:
                    raise ValueError(f"{folder / name} does not match its checksum; {_FIX}")
        identified = json.dumps([tokenizer.sha256, checksums], sort_keys=True)
        return cls(
            folder,
            tokenizer,
            num_tokens,
            offsets,
            hashlib.sha256(identified.encode()).hexdigest(),
            attributes["provenance"],
            readable["tokens"],
            readable.get("loss_weights"),
        )

    @property
    def has_loss_weights(self) -> bool:
        return self._weights is not None

    def read(self, start: int, length: int) -> np.ndarray:
        """A copy of the token ids uint32 [length] from position `start`; ValueError beyond the end of the store."""
        self._check_range(start, length)
        return self._tokens.read(start, length)

    def read_loss_weights(self, start: int, length: int) -> np.ndarray:
        """Loss weights uint8 [length] from position `start`; ones in a store without weights."""
        self._check_range(start, length)
        return self._weights.read(start, length) if self._weights is not None else np.ones(length, np.uint8)

    def _check_range(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise ValueError(
                f"{self.folder} has {self.num_tokens:,} tokens; cannot read {length:,} from position {start:,}"
            )


def _read_metadata(folder: Path) -> tuple[dict[str, Any], dict[str, zarr.Array[Any]]]:
    """Attributes of the store in `folder`, and its arrays by name."""
    try:
        group = zarr.open_group(folder, mode="r", zarr_format=3)
        attributes: dict[str, Any] = dict(group.attrs)
        arrays = {name: group[name] for name in ("tokens", "document_offsets")}
        if "loss_weights" in group:
            arrays["loss_weights"] = group["loss_weights"]
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is not a token store ({error}); make one by tokenizing text") from error
    wanted = {"tokenizer", "num_tokens", "shard_sha256", "provenance"}
    if attributes.get("format") != FORMAT or wanted - attributes.keys():
        raise ValueError(f"{folder} is not a token store of format {FORMAT}; tokenize the text again")
    return attributes, arrays  # type: ignore[return-value]


def _are_offsets(offsets: np.ndarray, num_tokens: int) -> bool:
    return bool(
        len(offsets) and offsets[0] == 0 and offsets[-1] == num_tokens and (np.diff(offsets) >= 0).all()
    )
