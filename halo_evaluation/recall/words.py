"""The words that serve as keys: most for training, the last of the list only for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HELD_OUT_WORDS = 500


@dataclass(frozen=True)
class WordSplit:
    """Disjoint words: `training` for generated episodes, `held_out` for evaluation items."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


def load_words(path: Path, held_out: int = HELD_OUT_WORDS) -> WordSplit:
    """Read a list of words separated by white space; the last `held_out` never appear in training.

    ValueError when the file is missing, repeats a word, or is too short to leave training words.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; give a text file with one word per line")
    words = tuple(path.read_text(encoding="utf-8").split())
    if len(set(words)) != len(words):
        repeated = next(word for position, word in enumerate(words) if word in words[:position])
        raise ValueError(
            f"{path} lists '{repeated}' twice; remove one, or held-out words would leak into training"
        )
    if len(words) < 2 * held_out:
        raise ValueError(
            f"{path} has {len(words)} words; at least {2 * held_out} are needed to hold out {held_out}"
        )
    return WordSplit(words[:-held_out], words[-held_out:])
