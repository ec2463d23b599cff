"""Round trips through the store, and the errors of damaged or foreign stores."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from durable_files import TEMPORARY_MARK
from tests.tokenized_data.conftest import IDENTITY, SHARD_TOKENS
from tokenized_data import TokenizerIdentity, TokenStore, TokenStoreWriter
from tokenized_data.store import _MappedShards, _ZarrArray
from tokenized_data.writer import INNER_CHUNK

INDEX_BYTES = 16 * (SHARD_TOKENS // INNER_CHUNK) + 4


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.fixture
def folder(write_store, random_documents) -> Path:
    return write_store(random_documents, weighted=True)


def test_round_trip_over_several_shards(folder, random_documents):
    store = TokenStore.open(folder, expected_tokenizer=IDENTITY, verify_content=True)
    everything = np.concatenate(random_documents)
    assert len(everything) > 2 * SHARD_TOKENS
    assert isinstance(store._tokens, _MappedShards)
    assert isinstance(store._weights, _MappedShards)
    assert store.num_tokens == len(everything)
    assert store.tokenizer == IDENTITY
    assert store.provenance == {"made_by": "test"}
    tokens = store.read(0, len(everything))
    assert tokens.dtype == np.uint32
    np.testing.assert_array_equal(tokens, everything)
    weights = store.read_loss_weights(0, len(everything))
    assert weights.dtype == np.uint8
    np.testing.assert_array_equal(weights, everything % 5)
    over_the_edge = slice(SHARD_TOKENS - 7, SHARD_TOKENS + 9)
    np.testing.assert_array_equal(store.read(over_the_edge.start, 16), everything[over_the_edge])
    assert len(store.read(store.num_tokens, 0)) == 0


def test_what_is_read_is_a_copy(folder, random_documents):
    store = TokenStore.open(folder)
    store.read(0, 4)[:] = 7
    np.testing.assert_array_equal(store.read(0, 4), random_documents[0][:4])


def test_zarr_reads_the_same(folder, random_documents):
    group = zarr.open_group(folder, mode="r")
    everything = np.concatenate(random_documents)
    np.testing.assert_array_equal(group["tokens"][:], everything)
    np.testing.assert_array_equal(group["loss_weights"][:], everything % 5)
    lengths = [len(document) for document in random_documents]
    np.testing.assert_array_equal(group["document_offsets"][:], np.cumsum([0, *lengths]))


def test_document_offsets(folder, random_documents):
    store = TokenStore.open(folder)
    assert store.document_offsets.dtype == np.int64
    assert len(store.document_offsets) == len(random_documents) + 1
    for number, document in enumerate(random_documents):
        start, end = store.document_offsets[number : number + 2]
        np.testing.assert_array_equal(store.read(int(start), int(end - start)), document)


def test_empty_documents_have_a_place(write_store):
    store = TokenStore.open(write_store([np.arange(5), np.arange(0), np.arange(7)]))
    assert store.document_offsets.tolist() == [0, 5, 5, 12]


def test_store_without_weights_weighs_all_one(write_store):
    store = TokenStore.open(write_store([np.arange(100)]))
    assert not store.has_loss_weights
    np.testing.assert_array_equal(store.read_loss_weights(5, 3), np.ones(3, np.uint8))


def test_a_shard_of_zeros_is_mapped_too(write_store):
    store = TokenStore.open(write_store([np.zeros(SHARD_TOKENS + 5, np.int64)]))
    assert isinstance(store._tokens, _MappedShards)
    assert store.read(0, SHARD_TOKENS + 5).sum() == 0


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (99, 2), (101, 0), (0, 101)])
def test_reading_beyond_the_ends(write_store, start, length):
    store = TokenStore.open(write_store([np.arange(100)]))
    for read in (store.read, store.read_loss_weights):
        with pytest.raises(ValueError, match=r"store has 100 tokens; cannot read"):
            read(start, length)


def test_digest_tells_content_and_tokenizer_apart(tmp_path):
    def digest(name: str, documents: list[np.ndarray], identity: TokenizerIdentity = IDENTITY) -> str:
        with TokenStoreWriter(
            tmp_path / name, identity, provenance={"name": name}, shard_tokens=SHARD_TOKENS
        ) as writer:
            for ids in documents:
                writer.add_document(ids)
        return TokenStore.open(tmp_path / name).digest

    whole, parts = [np.arange(9)], [np.arange(4), np.arange(4, 9)]
    assert digest("one", whole) == digest("same", whole)
    assert digest("one", whole) == digest("renamed", whole, replace(IDENTITY, name="other"))
    assert digest("one", whole) != digest("parts", parts), "the same tokens in other documents"
    assert digest("one", whole) != digest("other", whole, replace(IDENTITY, sha256="b" * 64))


@pytest.mark.parametrize("compressed", [True, False])
def test_other_layouts_are_read_through_zarr(folder, random_documents, compressed):
    everything = np.concatenate(random_documents)
    group = zarr.open_group(folder, mode="r+")
    del group["tokens"]
    settings = {"shards": (SHARD_TOKENS,)} if compressed else {"compressors": None}
    group.create_array("tokens", data=everything.astype(np.uint32), chunks=(INNER_CHUNK,), **settings)
    store = TokenStore.open(folder)
    assert isinstance(store._tokens, _ZarrArray)
    np.testing.assert_array_equal(store.read(1_000, 40_000), everything[1_000:41_000])
    last = folder / "tokens/c/2"
    if compressed:
        _flip(last, last.stat().st_size - 1)
        with pytest.raises(ValueError, match="tokens/c/2 has a shard index that does not match"):
            TokenStore.open(folder)
    last.unlink()
    with pytest.raises(ValueError, match="tokens/c/2 is missing"):
        TokenStore.open(folder)


def test_shard_without_its_empty_chunks_is_read_through_zarr(write_store):
    folder = write_store([np.zeros(INNER_CHUNK, np.int64), np.arange(INNER_CHUNK) % 1_000])
    group = zarr.open_group(folder, mode="r+")
    content = group["tokens"][:]
    serializer = group["tokens"].metadata.codecs[0]
    del group["tokens"]
    group.create_array(
        "tokens", data=content, chunks=(SHARD_TOKENS,), serializer=serializer, compressors=None, fill_value=0
    )
    assert (folder / "tokens/c/0").stat().st_size == INNER_CHUNK * 4 + INDEX_BYTES
    store = TokenStore.open(folder)
    assert isinstance(store._tokens, _ZarrArray)
    np.testing.assert_array_equal(store.read(0, SHARD_TOKENS), content)


def test_not_a_store(tmp_path):
    (tmp_path / "file").touch()
    zarr.open_group(tmp_path / "group", mode="w")
    for name in ("nothing", "file", "group"):
        with pytest.raises(ValueError, match=f"{name} is not a token store .*; make one by tokenizing text"):
            TokenStore.open(tmp_path / name)


def test_zarr_group_of_another_format(folder):
    zarr.open_group(folder, mode="r+").attrs["format"] = "another/1"
    with pytest.raises(ValueError, match=r"is not a token store of format hypenet-token-store/1"):
        TokenStore.open(folder)


def test_metadata_that_is_no_json(folder):
    (folder / "tokens/zarr.json").write_text("{")
    with pytest.raises(ValueError, match="store is not a token store"):
        TokenStore.open(folder)


@pytest.mark.parametrize("array", ["tokens", "loss_weights"])
@pytest.mark.parametrize("left", [0, 3, -1, -INNER_CHUNK])
def test_truncated_shard(folder, array, left):
    shard = folder / array / "c/1"
    content = shard.read_bytes()
    shard.write_bytes(content[:left])
    with pytest.raises(ValueError, match=rf"{array}/c/1 is truncated to \d+ bytes; .*tokenize again"):
        TokenStore.open(folder)


def test_shard_that_lost_its_middle(folder):
    shard = folder / "tokens/c/1"
    content = shard.read_bytes()
    shard.write_bytes(content[:100] + content[200:])
    with pytest.raises(ValueError, match=r"tokens/c/1 has .* fewer than its index refers to"):
        TokenStore.open(folder)


def test_missing_shard(folder):
    (folder / "tokens/c/2").unlink()
    with pytest.raises(ValueError, match="tokens/c/2 is missing"):
        TokenStore.open(folder)


@pytest.mark.parametrize("position", [-1, -INDEX_BYTES, -20])
def test_flipped_byte_in_the_index(folder, position):
    _flip(folder / "tokens/c/0", position)
    with pytest.raises(ValueError, match="tokens/c/0 has a shard index that does not match its checksum"):
        TokenStore.open(folder)


@pytest.mark.parametrize("file", ["tokens/c/1", "loss_weights/c/0"])
def test_flipped_byte_in_the_content(folder, file):
    _flip(folder / file, 1_000)
    TokenStore.open(folder)
    with pytest.raises(ValueError, match=f"{file} does not match its checksum; .*tokenize again"):
        TokenStore.open(folder, verify_content=True)


def test_flipped_byte_in_the_document_offsets(folder):
    file = folder / "document_offsets/c/0"
    _flip(file, 8)  # by one token: still in order
    with pytest.raises(ValueError, match="document_offsets/c/0 does not match its checksum"):
        TokenStore.open(folder, verify_content=True)
    _flip(file, file.stat().st_size - 8)
    with pytest.raises(ValueError, match="has arrays that do not match its"):
        TokenStore.open(folder)


def test_made_with_another_tokenizer(folder):
    expected = TokenizerIdentity("larger", "c" * 64, 2_000, 0)
    with pytest.raises(ValueError, match=r"store was made with the tokenizer tiny \(.*, not larger \("):
        TokenStore.open(folder, expected_tokenizer=expected)


@pytest.mark.parametrize("outside", [-1, 1_000])
def test_ids_outside_the_vocabulary(tmp_path, outside):
    with (
        pytest.raises(ValueError, match="are not all in the vocabulary of tiny"),
        TokenStoreWriter(tmp_path / "store", IDENTITY, provenance={}) as writer,
    ):
        writer.add_document(np.array([5, outside]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("weighted", "weights"), [(True, None), (True, np.ones(2, np.uint8)), (False, np.ones(3, np.uint8))]
)
def test_weights_that_do_not_fit(tmp_path, weighted, weights):
    with (
        pytest.raises(ValueError, match="loss weight"),
        TokenStoreWriter(tmp_path / "store", IDENTITY, provenance={}, loss_weights=weighted) as writer,
    ):
        writer.add_document(np.arange(3), weights)


@pytest.mark.parametrize("shard_tokens", [0, INNER_CHUNK + 1])
def test_shards_of_no_whole_number_of_chunks(tmp_path, shard_tokens):
    with pytest.raises(ValueError, match="is not a multiple of 16384"):
        TokenStoreWriter(tmp_path / "store", IDENTITY, provenance={}, shard_tokens=shard_tokens)


def test_unfinished_store_is_invisible(tmp_path):
    def interrupted() -> None:
        with TokenStoreWriter(
            tmp_path / "store", IDENTITY, provenance={}, shard_tokens=INNER_CHUNK
        ) as writer:
            writer.add_document(np.zeros(2 * INNER_CHUNK, np.int64))
            assert not (tmp_path / "store").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_writers_side_by_side_leave_each_other_alone(tmp_path):
    with TokenStoreWriter(tmp_path / "one", IDENTITY, provenance={}, shard_tokens=INNER_CHUNK) as one:
        one.add_document(np.ones(INNER_CHUNK, np.int64))  # a shard that is written before the other begins
        with TokenStoreWriter(tmp_path / "two", IDENTITY, provenance={}) as two:
            two.add_document(np.arange(4))
        one.add_document(np.arange(3))
    first, second = (TokenStore.open(tmp_path / name, verify_content=True) for name in ("one", "two"))
    assert (first.num_tokens, second.num_tokens) == (INNER_CHUNK + 3, 4)
    assert first.read(0, INNER_CHUNK).sum() == INNER_CHUNK


_KILLED = f"""
import os, signal, sys
from pathlib import Path
import numpy as np
from tokenized_data import TokenizerIdentity, TokenStoreWriter
identity = TokenizerIdentity("tiny", "a" * 64, 1_000, 0)
with TokenStoreWriter(Path(sys.argv[1]), identity, provenance={{}}, shard_tokens={INNER_CHUNK}) as writer:
    writer.add_document(np.zeros({2 * INNER_CHUNK}, np.int64))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_writer_leaves_the_old_store(write_store, tmp_path):
    folder = write_store([np.arange(100)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(folder)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = (path for path in tmp_path.iterdir() if path != folder)
    assert TEMPORARY_MARK in leftover.name
    assert TokenStore.open(folder, verify_content=True).num_tokens == 100
    with pytest.raises(ValueError, match="is not a token store"):
        TokenStore.open(leftover)
    write_store([np.arange(7)], "other")
    assert leftover.exists(), "of another store"
    assert TokenStore.open(write_store([np.arange(50)])).num_tokens == 50
    assert not leftover.exists()


def test_what_a_living_writer_has_begun_stays(tmp_path):
    with TokenStoreWriter(tmp_path / "store", IDENTITY, provenance={}, shard_tokens=INNER_CHUNK) as one:
        one.add_document(np.ones(INNER_CHUNK, np.int64))
        with TokenStoreWriter(tmp_path / "store", IDENTITY, provenance={}) as other:
            other.add_document(np.arange(4))
        assert TokenStore.open(tmp_path / "store").num_tokens == 4
    assert TokenStore.open(tmp_path / "store", verify_content=True).num_tokens == INNER_CHUNK
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("room", [200, INNER_CHUNK])
def test_disk_without_room_names_the_store(tmp_path, room):
    """A limit on the size of files stands in for a full disk; both fail inside write(2).

    200 bytes do for the metadata of the group but not of an array.
    """

    def write() -> None:
        with TokenStoreWriter(
            tmp_path / "store", IDENTITY, provenance={}, shard_tokens=INNER_CHUNK
        ) as writer:
            writer.add_document(np.zeros(INNER_CHUNK, np.int64))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError) as raised:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "store") in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError) as raised,
        TokenStoreWriter(tmp_path / "file/store", IDENTITY, provenance={}),
    ):
        pass
    assert str(tmp_path / "file/store") in str(raised.value)


def test_moved_store_stays_readable(folder, tmp_path, random_documents):
    moved = shutil.move(folder, tmp_path / "moved")
    store = TokenStore.open(moved, verify_content=True)
    np.testing.assert_array_equal(store.read(0, 10), random_documents[0][:10])
