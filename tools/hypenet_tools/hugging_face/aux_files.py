"""What a model folder holds beside its weights: tokenizer, chat template, generation config, model card, licence."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from durable_files import sha256_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
GENERATION_CONFIG, MODEL_CARD, CHECKSUM_FILE = "generation_config.json", "README.md", "SHA256SUMS"
AUX_FILES = (*TOKENIZER_FILES, "chat_template.json", GENERATION_CONFIG, MODEL_CARD, "LICENSE")

_LICENCE = re.compile(r"""^license: *["']?([^\s"']+)["']? *$""", re.MULTILINE)


def aux_files(folder: Path) -> list[Path]:
    """The auxiliary files that `folder` has."""
    return [folder / name for name in AUX_FILES if (folder / name).is_file()]


def copy_aux_files(source: Path, target: Path) -> None:
    """Copy the auxiliary files of `source`. `target` is created if there are any."""
    for path in aux_files(source):
        target.mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.name)


def licence_of(folder: Path) -> str:
    """The licence that the model card of `folder` states; "other" if it states none."""
    card = folder / MODEL_CARD
    found = _LICENCE.search(card.read_text()) if card.is_file() else None
    return found[1] if found else "other"


def fingerprint(folder: Path) -> list[list[Any]]:
    """[name, bytes, mtime_ns] of the files of a model folder. It changes when the folder does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        [str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
        if path.suffix in (".safetensors", ".json") or path.name in AUX_FILES
    ]


def source_digest(folder: Path) -> dict[str, str]:
    """Identifies a Hugging Face folder in a provenance: by its checksum file, or else by sizes and headers."""
    sums = folder / CHECKSUM_FILE
    if sums.is_file():
        return {"of": CHECKSUM_FILE, "sha256": sha256_file(sums)}
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as handle:
            digest.update(handle.read(int.from_bytes(handle.read(8), "little")))
    return {"of": "safetensors headers", "sha256": digest.hexdigest()}
