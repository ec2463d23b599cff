"""The words that serve as keys: most for training, the last ones for evaluation only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HELD_OUT_WORDS = 500


@dataclass(frozen=True)
class WordSplit:
    """Disjoint words: `training` for recall episodes, `held_out` for evaluation items."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


def load_words(path: Path, held_out: int = HELD_OUT_WORDS) -> WordSplit:
    """Read words separated by white space. The last `held_out` of them never occur in training.

    Raises ValueError if the file is missing, repeats a word, or has fewer than 2 * held_out words.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; give a text file with one word per line")
    words = tuple(path.read_text(encoding="utf-8").split())
    if len(set(words)) != len(words):
        repeated = next(word for position, word in enumerate(words) if word in words[:position])
        raise ValueError(
            f"{path} lists '{repeated}' twice; remove one, so that no held-out word is in training"
        )
    if len(words) < 2 * held_out:
        raise ValueError(
            f"{path} has {len(words)} words; add words: {2 * held_out} are needed to hold out {held_out}"
        )
    return WordSplit(words[:-held_out], words[-held_out:])
