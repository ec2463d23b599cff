"""Which tokenizer made a store: token ids mean nothing without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from durable_files import read_json, sha256_file


@dataclass(frozen=True)
class TokenizerIdentity:
    """`sha256` is that of tokenizer.json; `vocab_size` counts ids up to the largest one in use."""

    name: str
    sha256: str
    vocab_size: int
    eos_id: int

    def describe(self) -> str:
        return f"{self.name} ({self.vocab_size} tokens, sha256 {self.sha256[:12]})"


def load_tokenizer_identity(folder: Path) -> TokenizerIdentity:
    """Identity of the Hugging Face tokenizer in `folder`; ValueError names what is missing."""
    tokenizer_file = folder / "tokenizer.json"
    tokenizer = read_json(tokenizer_file)
    ids = {
        **tokenizer["model"]["vocab"],
        **{token["content"]: token["id"] for token in tokenizer["added_tokens"]},
    }
    eos = read_json(folder / "tokenizer_config.json").get("eos_token")
    eos_text = eos["content"] if isinstance(eos, dict) else eos
    if eos_text not in ids:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} names no eos_token of {tokenizer_file}; add one"
        )
    return TokenizerIdentity(folder.name, sha256_file(tokenizer_file), max(ids.values()) + 1, ids[eos_text])
