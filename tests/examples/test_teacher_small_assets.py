"""The assets of the embedded teacher: tokenizer, word list, addresses."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from durable_files import sha256_file
from examples.teacher_small.bpe import train_bpe
from examples.teacher_small.prose import DOCUMENT_SEPARATOR
from examples.teacher_small.words import common_words
from halo_jobs.recipe import ASSETS


@pytest.fixture(scope="module")
def training_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    addresses = (ASSETS / "sotu" / "addresses.jsonl").read_text().splitlines()[:4]
    path.write_text(DOCUMENT_SEPARATOR.join(json.loads(line)["text"] for line in addresses))
    return path


def test_trained_tokenizer_loads_and_round_trips(tmp_path: Path, training_text: Path) -> None:
    train_bpe([training_text], tmp_path / "tokenizer", 600)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 600 and tokenizer.model_max_length == 4096
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    text = "It's 2024 – café\n\n  key: 9f3a-11<|im_end|>  Fellow-Citizens \U0001f600\t."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert 1 in ids and tokenizer.convert_ids_to_tokens(tokenizer("2024").input_ids) == ["2", "0", "2", "4"]
    assert tokenizer("café").input_ids == tokenizer(unicodedata.normalize("NFD", "café")).input_ids
    train_bpe([training_text], tmp_path / "again", 600)
    assert sha256_file(tmp_path / "again/tokenizer.json") == sha256_file(
        tmp_path / "tokenizer/tokenizer.json"
    )


def test_too_little_text_for_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("hardly any text")
    with pytest.raises(ValueError, match="1000"):
        train_bpe([tmp_path / "t.txt"], tmp_path / "tokenizer", 1000)
    assert not (tmp_path / "tokenizer").exists()


def test_committed_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer-small")
    assert len(tokenizer) == 8192
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    lengths: dict[str, int] = defaultdict(int)
    for line in (ASSETS / "sotu" / "addresses.jsonl").read_text().splitlines()[:2]:
        text = json.loads(line)["text"]
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        lengths["characters"] += len(text)
        lengths["tokens"] += len(ids)
    assert 3.5 < lengths["characters"] / lengths["tokens"] < 5.5


def test_common_words_need_both_kinds_of_text(tmp_path: Path) -> None:
    literary, technical = tmp_path / "l.txt", tmp_path / "t.txt"
    literary.write_text(
        "window window-pane Garden garden's the with carriage window garden " * 9 + "rarely " * 4
    )
    technical.write_text("window windows garden kernel files.window with window rarely " * 9)
    words = common_words([literary], [technical], 10)
    assert sorted(words) == ["garden", "window"]


def test_committed_assets_are_whole() -> None:
    addresses = ASSETS / "sotu" / "addresses.jsonl"
    assert sha256_file(addresses) in (ASSETS / "sotu" / "README.md").read_text()
    years = [json.loads(line)["year"] for line in addresses.read_text().splitlines()]
    assert years == sorted(years) and len(years) == 24

    words = (ASSETS / "words.txt").read_text().split()
    assert len(set(words)) == len(words) == 3000
    assert all(re.fullmatch("[a-z]{4,9}", word) for word in words)
