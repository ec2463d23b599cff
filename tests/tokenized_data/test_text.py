"""From text files to stores: reading, splitting, encoding, and the errors of malformed files."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from tokenized_data import TokenStore, load_tokenizer_identity, text, tokenize_text

TEXTS = [f"the river {n} feeds\nthe garden near   the harbour {n * n} é" for n in range(300)]


def _write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _write_parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    pyarrow.parquet.write_table(pa.table({"id": range(len(texts)), column: texts}), path)
    return path


@pytest.fixture
def tokenizer(tokenizer_folder) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@pytest.fixture
def documents_of(tokenizer):
    """Documents of a store as text, after checking that each ends in EOS and has no other."""

    def decode(store: TokenStore) -> list[str]:
        decoded = []
        for start, end in zip(store.document_offsets[:-1], store.document_offsets[1:], strict=True):
            ids = store.read(int(start), int(end - start))
            assert np.flatnonzero(ids == store.tokenizer.eos_id).tolist() == [len(ids) - 1]
            decoded.append(tokenizer.decode(ids[:-1].tolist()))
        return decoded

    return decode


def test_identity(tokenizer_folder, tokenizer):
    identity = load_tokenizer_identity(tokenizer_folder)
    assert (identity.name, identity.eos_id) == ("tiny", tokenizer.token_to_id("<|end|>"))
    assert identity.vocab_size == tokenizer.get_vocab_size()
    assert len(identity.sha256) == 64


def test_identity_counts_added_tokens_beyond_a_gap(tokenizer_folder, tmp_path):
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 400, "content": "<|late|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|late|>"}')
    identity = load_tokenizer_identity(tmp_path)
    assert identity.eos_id == identity.vocab_size - 1
    assert identity.sha256 != load_tokenizer_identity(tokenizer_folder).sha256


def test_identity_of_what_is_no_tokenizer(tokenizer_folder, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        load_tokenizer_identity(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer \(.*; restore it"):
        load_tokenizer_identity(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=r"tokenizer_config\.json does not exist"):
        load_tokenizer_identity(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|other|>"}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json names no eos_token of .*; add one"):
        load_tokenizer_identity(tmp_path)


def test_jsonl(tmp_path, tokenizer_folder, documents_of):
    source = _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    store = tokenize_text([source], tokenizer_folder, tmp_path / "store")
    assert documents_of(store) == TEXTS
    assert store.tokenizer == load_tokenizer_identity(tokenizer_folder)
    assert store.provenance == {"files": ["a.jsonl"], "split": "all", "held_out_share": 0.01}
    assert not store.has_loss_weights


def test_folder_of_all_kinds_in_order(tmp_path, tokenizer_folder, documents_of):
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    _write_parquet(folder / "inner/c.parquet", ["five", None, "", "six"])
    (folder / "b.txt").write_text("three\n\x00\n\nfour\n\x00\n \n")
    _write_jsonl(folder / "a.jsonl", ["one", "  ", "two"])
    (folder / "README.md").write_text("no text of ours")
    store = tokenize_text([folder], tokenizer_folder, tmp_path / "store")
    assert documents_of(store) == ["one", "two", "three", "\nfour", "five", "six"]
    assert store.provenance["files"] == ["a.jsonl", "b.txt", "c.parquet"]
    again = tokenize_text([folder], tokenizer_folder, tmp_path / "again")
    assert again.digest == store.digest


def test_every_format_gives_the_same_store(tmp_path, tokenizer_folder):
    """Also with the documents in several files of a folder."""
    texts = [text.replace("\n", " ") for text in TEXTS[:40]]
    sources = {
        "jsonl": _write_jsonl(tmp_path / "a.jsonl", texts),
        "parquet": _write_parquet(tmp_path / "a.parquet", texts),
        "txt": tmp_path / "a.txt",
        "folder": tmp_path / "folder",
    }
    sources["txt"].write_text("\n\x00\n".join(texts))
    (sources["folder"] / "inner").mkdir(parents=True)
    _write_parquet(sources["folder"] / "1.parquet", texts[:7])
    _write_jsonl(sources["folder"] / "2.jsonl", texts[7:30])
    (sources["folder"] / "inner/3.txt").write_text("\n\x00\n".join(texts[30:]))
    stores = {
        name: tokenize_text([source], tokenizer_folder, tmp_path / f"store {name}")
        for name, source in sources.items()
    }
    assert len(stores["jsonl"].document_offsets) == 41
    assert {name: store.digest for name, store in stores.items()} == dict.fromkeys(
        stores, stores["jsonl"].digest
    )


def test_txt_without_separators_is_one_document(tmp_path, tokenizer_folder, documents_of):
    source = tmp_path / "a.txt"
    source.write_bytes("\ufeffone\r\n\r\ntwo \x00 not a line of its own\r\n".encode())
    store = tokenize_text([source], tokenizer_folder, tmp_path / "store")
    assert documents_of(store) == ["one\n\ntwo \x00 not a line of its own\n"]


@pytest.mark.parametrize(
    ("gap", "exact"), [(" ", True), ("\n", True), ("\n\n  ", True), ("  ", False), ("", False)]
)
def test_long_documents_are_cut_between_words_and_lose_nothing(
    tmp_path, tokenizer_folder, documents_of, tokenizer, monkeypatch, gap, exact
):
    monkeypatch.setattr(text, "_PIECE_CHARACTERS", 100)
    monkeypatch.setattr(text, "_PIECES_PER_BATCH", 7)  # so that a document runs over several batches
    words = [f"harbour{n}." for n in range(1_000, 1_300)]
    long = gap.join(words)
    pieces = list(text._pieces(long))
    assert len(pieces) > 20
    assert max(map(len, pieces)) <= 100
    assert "".join(pieces) == long
    if gap:
        assert all(left[-1].isspace() or right[0].isspace() for left, right in pairwise(pieces))
    source = _write_jsonl(tmp_path / "a.jsonl", ["before", long, "after"])
    store = tokenize_text([source], tokenizer_folder, tmp_path / "store")
    assert documents_of(store) == ["before", long, "after"]
    if exact:
        start, end = store.document_offsets[1:3]
        whole = tokenizer.encode(long, add_special_tokens=False).ids
        assert store.read(int(start), int(end - start)).tolist() == [*whole, store.tokenizer.eos_id]


def test_the_name_of_a_special_token_is_text(tmp_path, tokenizer_folder, documents_of):
    texts = [
        "<|end|>",
        "the <|end|> of the river",
        "x" * 9_995 + " <|end|> " + "y" * 20_000,
        "a\n<|end|>\n<|end|>",
    ]
    store = tokenize_text([_write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer_folder, tmp_path / "store")
    assert documents_of(store) == texts


def test_train_and_held_out_share_no_document(tmp_path, tokenizer_folder, documents_of):
    source = _write_jsonl(tmp_path / "a.jsonl", TEXTS + TEXTS[:50])
    copies = _write_parquet(tmp_path / "b.parquet", [f"\n{document} " for document in TEXTS[50:100]])
    train, held_out = (
        documents_of(
            tokenize_text(
                [source, copies], tokenizer_folder, tmp_path / split, split=split, held_out_share=0.2
            )
        )
        for split in ("train", "held_out")
    )
    assert len(train) + len(held_out) == 400
    assert {document.strip() for document in train}.isdisjoint(document.strip() for document in held_out)
    assert {document.strip() for document in train + held_out} == set(TEXTS)
    assert 35 < len({document.strip() for document in held_out}) < 85  # 60 expected


def test_held_out_share_grows_by_adding(tmp_path):
    small, large = ({t for t in TEXTS if text.is_held_out(t, share)} for share in (0.05, 0.3))
    assert small < large
    assert not any(text.is_held_out(document, 0.0) for document in TEXTS)
    assert all(text.is_held_out(document, 1.0) for document in TEXTS)


def test_nothing_to_tokenize(tmp_path, tokenizer_folder):
    source = _write_jsonl(tmp_path / "a.jsonl", [" ", ""])
    with pytest.raises(ValueError, match=r"a\.jsonl has no document for .*store .*; give more text"):
        tokenize_text([source], tokenizer_folder, tmp_path / "store")
    with pytest.raises(ValueError, match=r"held-out share 0\.0"):
        tokenize_text(
            [_write_jsonl(source, TEXTS)],
            tokenizer_folder,
            tmp_path / "store",
            split="held_out",
            held_out_share=0.0,
        )
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    "line",
    ['{"text": "cut', '{"txt": "a"}', '["text"]', '"text"', "7", '{"text": null}', r'{"text": "\ud800"}'],
)
def test_malformed_jsonl_line(tmp_path, tokenizer_folder, line):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "good"}\n\n' + line + '\n{"text": "good"}\n')
    with pytest.raises(ValueError, match=r'a\.jsonl:3 is not a JSON object with a "text" string; fix'):
        tokenize_text([source], tokenizer_folder, tmp_path / "store")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_file_that_is_not_utf8(tmp_path, tokenizer_folder, suffix):
    source = tmp_path / f"a{suffix}"
    source.write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=rf"a{suffix}:2 is not UTF-8 text \(.*; convert the file"):
        tokenize_text([source], tokenizer_folder, tmp_path / "store")


def test_parquet_that_cannot_be_used(tmp_path, tokenizer_folder):
    source = _write_parquet(tmp_path / "a.parquet", ["one"], column="content")
    with pytest.raises(
        ValueError, match=r"has no string column 'text' but id \(int64\), content \(string\); rename"
    ):
        tokenize_text([source], tokenizer_folder, tmp_path / "store")
    pyarrow.parquet.write_table(pa.table({"text": [1, 2]}), source)
    with pytest.raises(ValueError, match=r"has no string column 'text' but text \(int64\)"):
        tokenize_text([source], tokenizer_folder, tmp_path / "store")
    _write_parquet(source, TEXTS)
    source.write_bytes(source.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file \(.*; download it again"):
        tokenize_text([source], tokenizer_folder, tmp_path / "store")


def test_sources_without_text(tmp_path, tokenizer_folder):
    (tmp_path / "a.csv").touch()
    for source in (tmp_path, tmp_path / "a.csv"):
        with pytest.raises(ValueError, match=r"has no \.txt, \.jsonl, \.parquet files"):
            tokenize_text([source], tokenizer_folder, tmp_path / "store")
    with pytest.raises(ValueError, match="missing does not exist"):
        tokenize_text([tmp_path / "missing"], tokenizer_folder, tmp_path / "store")


def test_bar_counts_every_byte(tmp_path, tokenizer_folder):
    sources = [
        _write_jsonl(tmp_path / "a.jsonl", TEXTS),
        _write_parquet(tmp_path / "b.parquet", TEXTS),
        tmp_path / "c.txt",
    ]
    sources[2].write_text("the river\r\nthe garden")
    size = sum(path.stat().st_size for path in sources)
    assert size < 100_000
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    tokenize_text(sources, tokenizer_folder, tmp_path / "store", console=terminal)
    shown = f"{size / 1000:.1f}/{size / 1000:.1f} kB"
    assert shown in terminal.file.getvalue()
    quiet = Console(file=io.StringIO(), width=100)
    tokenize_text(sources, tokenizer_folder, tmp_path / "store", console=quiet)
    assert quiet.file.getvalue() == ""
