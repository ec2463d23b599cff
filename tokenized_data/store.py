"""Reads a token store at memory speed: shards are checked when it is opened, then memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

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
_MAPS_KEPT = 256  # each holds a file descriptor, of which a process commonly has 1,024
_MEND = "the store is damaged: delete it and tokenize again"


def _shard_index(path: Path, inner_chunks: int, plain_bytes: int) -> np.ndarray:
    """Offsets and lengths, uint64 [inner_chunks, 2], from the end of a shard; ValueError when it is not whole.

    `plain_bytes`: size of the whole shard if it is uncompressed, 0 if that cannot be known.
    """
    index_bytes = _INDEX_ENTRY * inner_chunks + _CRC
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {_MEND}") from None
    with open(path, "rb") as handle:
        handle.seek(max(0, size - index_bytes))
        index = handle.read()
    crc_matches = int.from_bytes(index[-_CRC:], "little") == google_crc32c.value(index[:-_CRC])
    if size < index_bytes or (not crc_matches and size < plain_bytes):
        raise ValueError(f"{path} is truncated to {size} bytes; {_MEND}")
    if not crc_matches:
        raise ValueError(f"{path} has a shard index that does not match its checksum; {_MEND}")
    entries = np.frombuffer(index[:-_CRC], "<u8").reshape(-1, 2)
    ends = entries[entries[:, 0] != _ABSENT].sum(axis=1)
    if len(ends) and int(ends.max()) > size - index_bytes:
        raise ValueError(f"{path} has {size} bytes, fewer than its index speaks of; {_MEND}")
    return entries


class _Readable(Protocol):
    def read(self, start: int, length: int) -> np.ndarray: ...


class _MappedShards:
    """A sharded 1-D array as one address range. Shard files begin with their values, without gaps."""

    def __init__(self, paths: Sequence[Path], dtype: np.dtype[Any], shard_length: int, length: int) -> None:
        self._paths, self._dtype = paths, dtype
        self._shard_length, self._length = shard_length, length
        self._shard = lru_cache(_MAPS_KEPT)(self._map)

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
class _ThroughZarr:
    """Any other layout that zarr can read, for example compressed shards: slow, but right."""

    array: zarr.Array[Any]

    def read(self, start: int, length: int) -> np.ndarray:
        return np.asarray(self.array[start : start + length])


def _indexed_sharding(codecs: Sequence[Any]) -> ShardingCodec | None:
    """The sharding codec, if shards end in an index that carries its crc32c."""
    if len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
        return None
    location = codecs[0].index_location
    at_end = getattr(location, "value", location) == "end"  # an enumeration before zarr 3.4
    return codecs[0] if at_end and codecs[0].index_codecs == (BytesCodec(), Crc32cCodec()) else None


def _open_array(folder: Path, array: zarr.Array[Any]) -> _Readable:
    """Check every shard file of the array in `folder`, and map them if their layout is the plain one."""
    metadata: Any = array.metadata  # of version 3, as it was opened
    (length,) = array.shape
    (shard_length,), (inner_chunk,) = array.shards or array.chunks, array.chunks
    starts = range(0, length, shard_length)
    paths = [folder / metadata.encode_chunk_key((number,)) for number in range(len(starts))]
    sharding = _indexed_sharding(metadata.codecs)
    if sharding is None:
        for path in paths:  # zarr would read a missing chunk as zeros
            if not path.is_file():
                raise ValueError(f"{path} is missing; {_MEND}")
        return _ThroughZarr(array)
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
    return _MappedShards(paths, dtype, shard_length, length) if in_place else _ThroughZarr(array)


@dataclass(frozen=True)
class TokenStore:
    """A finished store. `document_offsets` is int64 [documents + 1]; `digest` identifies tokenizer and content."""

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
        """Open and check; ValueError names the store and the mend when it is not one, damaged, or of another tokenizer.

        Shard sizes and indexes are always checked, their whole content with `verify_content`.
        """
        attributes, arrays = _read_metadata(folder)
        tokenizer = TokenizerIdentity(**attributes["tokenizer"])
        if expected_tokenizer is not None and expected_tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(
                f"{folder} was made with the tokenizer {tokenizer.describe()}, not {expected_tokenizer.describe()}; "
                "tokenize the text again with the model's own"
            )
        num_tokens, checksums = attributes["num_tokens"], attributes["shard_sha256"]
        lengths = {arrays[name].shape[0] for name in ("tokens", "loss_weights") if name in arrays}
        offsets = np.asarray(arrays["document_offsets"][:])
        if lengths != {num_tokens} or not _cover(offsets, num_tokens):
            raise ValueError(f"{folder} has arrays of other lengths than its {num_tokens:,} tokens; {_MEND}")
        readable = {
            name: _open_array(folder / name, arrays[name])
            for name in ("tokens", "loss_weights")
            if name in arrays
        }
        if verify_content:
            _check_content(folder, checksums)
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
        """Token ids uint32 [length] from position `start`, a copy; ValueError beyond the store's end."""
        self._check_range(start, length)
        return self._tokens.read(start, length)

    def read_loss_weights(self, start: int, length: int) -> np.ndarray:
        """Loss weights uint8 [length]; ones in a store without any."""
        self._check_range(start, length)
        return self._weights.read(start, length) if self._weights is not None else np.ones(length, np.uint8)

    def _check_range(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise ValueError(
                f"{self.folder} has {self.num_tokens:,} tokens, so {length:,} from position {start:,} cannot be read; "
                "ask for fewer"
            )


def _read_metadata(folder: Path) -> tuple[dict[str, Any], dict[str, zarr.Array[Any]]]:
    """Attributes and arrays by name of the store in `folder`."""
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


def _cover(offsets: np.ndarray, num_tokens: int) -> bool:
    return bool(
        len(offsets) and offsets[0] == 0 and offsets[-1] == num_tokens and (np.diff(offsets) >= 0).all()
    )


def _check_content(folder: Path, checksums: dict[str, str]) -> None:
    for name, checksum in checksums.items():
        if sha256_file(folder / name) != checksum:
            raise ValueError(f"{folder / name} does not match its checksum; {_MEND}")
