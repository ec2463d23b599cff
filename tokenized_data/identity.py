"""Identifies the tokenizer that made a store. Token ids mean nothing without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from durable_files import read_json, sha256_file


@dataclass(frozen=True)
class TokenizerIdentity:
    """`sha256` is the checksum of tokenizer.json. `vocab_size` is the largest id plus one."""

    name: str
    sha256: str
    vocab_size: int
    eos_id: int

    def describe(self) -> str:
        return f"{self.name} ({self.vocab_size} tokens, sha256 {self.sha256[:12]})"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer.json in `folder`, set to encode texts of any length whole and as plain text.

    Text that spells a special token, such as "<|endoftext|>", does not become that token.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give the folder of a Hugging Face tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{file} is not a tokenizer ({error}); restore it") from None
    # Files saved after fine-tuning may set both, which would silently truncate or pad documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as ordinary text, that is
    return tokenizer


def load_tokenizer_identity(folder: Path) -> TokenizerIdentity:
    """Identity of the Hugging Face tokenizer in `folder`. ValueError names what is missing."""
    tokenizer_file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    ids = load_tokenizer(folder).get_vocab(with_added_tokens=True)
    eos = read_json(config_file).get("eos_token")
    eos_text = eos["content"] if isinstance(eos, dict) else eos
    if eos_text not in ids:
        raise ValueError(f"{config_file} names no eos_token of {tokenizer_file}; add one")
    name = folder.absolute().name
    return TokenizerIdentity(name, sha256_file(tokenizer_file), max(ids.values()) + 1, ids[eos_text])
