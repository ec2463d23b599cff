"""A small byte-level BPE tokenizer that splits text as Qwen's does, saved as a Hugging Face tokenizer folder."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from durable_files import publish_folder, temporary_sibling, write_json

END_OF_TEXT = "<|endoftext|>"
END_OF_MESSAGE = "<|im_end|>"
MODEL_MAX_LENGTH = 4096

# Qwen's pattern: every digit is a token of its own.
_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PIECE_CHARACTERS = 4000
_LONGEST_TOKEN = 24  # characters; longer merges only memorise boilerplate


def _read_text(path: Path) -> str:
    return path.read_text().replace("\x00", "")


def _sample(text_files: Sequence[Path], characters: int, seed: int) -> Iterator[str]:
    """Random pieces of the files in file order, about `characters` in total. Reads each file twice."""
    share = characters / max(sum(len(_read_text(path)) for path in text_files), 1)
    chooser = random.Random(seed)
    for path in text_files:
        text = _read_text(path)
        for start in range(0, len(text), _PIECE_CHARACTERS):
            if chooser.random() < share:
                yield text[start : start + _PIECE_CHARACTERS]


def _untrained_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    return tokenizer


def train_bpe(
    text_files: Sequence[Path],
    out_folder: Path,
    vocab_size: int = 8192,
    *,
    sample_characters: int = 40_000_000,
    seed: int = 2,
) -> None:
    """Train on a sample of `text_files` (UTF-8) and publish `out_folder` for AutoTokenizer.

    Id 0 is <|endoftext|>, which also pads; id 1 is <|im_end|>. Raises ValueError when the text yields fewer than
    `vocab_size` tokens.
    """
    tokenizer = _untrained_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, END_OF_MESSAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=_LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(text_files, sample_characters, seed), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"{len(text_files)} text files yield {tokenizer.get_vocab_size()} tokens, not {vocab_size}; "
            "add text or lower the vocabulary size"
        )
    folder = temporary_sibling(out_folder)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "additional_special_tokens": [END_OF_MESSAGE],
            "model_max_length": MODEL_MAX_LENGTH,
            "clean_up_tokenization_spaces": False,
        },
    )
    publish_folder(folder, out_folder)
