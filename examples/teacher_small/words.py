"""Common English words, used as keys in recall tasks."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from examples.teacher_small.prose import COMMON_WORDS

_WORD = re.compile(r"(?<![\w'’.@/-])[a-z]{4,9}(?![\w'’@/-])")
_FEWEST = 5  # occurrences in each kind of text; rarer words are names, typos and jargon
# The first 8 hex digits of the SHA-256 of words that do not belong in a demonstration.
_UNWANTED_TEXT = """
    01593d28 0508a634 05b3b66d 08234c94 0ebdc331 0ec52f57 0f28c496 110c6c5a 11cf8376 120f6e5b
    12a667c9 158869a9 167a79b5 183936b0 1b253a25 1b38e69c 1de83442 1e02eec4 2189c0ed 21ff590c
    235e2853 28a3a5e8 2a6937d7 2bda9b4d 2c1d8af3 2c32c156 2e2a68ae 31506a84 38136d6e 39c7ad80
    3e8e40c0 4098e1a8 42c75396 45d866ee 45fb7c3b 460ed72c 47b673e0 48fab7a5 4ae19158 4b18aefe
    4bb60e47 5055fa00 50afe488 50c00489 522788b6 529b7ecf 52c8e029 5304378d 533f8cc0 566f532d
    56b8d8de 5921fb04 59a2418c 59cc3cb8 5a9d9dce 5b3ae48b 5ddf61f4 5ebdc7b0 6537f8ab 6672b930
    6ac3c336 6adc452d 6ef9d9fd 737dd1bc 76f03622 779e6186 7837b027 78a00d18 796e43a5 79e216f9
    7bc67115 7f5a9ba1 8171c4ec 8353bea1 85fc17f7 867d7897 886d51e9 89364a0a 8b6f82db 8bedb0f8
    8c5c0439 8f16aaa0 8f5083e3 9270c8c3 937d56e4 938b345c 94a2b576 99e367bc 9ae315a9 a1c1a3b7
    a24efab8 a32876c6 a3686065 a3fbe091 a4c7815e a52ff550 a76d588d a9f41dff ac2798d7 ac996ae4
    acefec68 ad505b0b adedda9c affc8757 b690cdbe b81d6dc2 ba6fb01a bd331fb1 bd778891 c0bb7ca7
    c22f315f c2c3b68b c2d214a4 c68fef1a c99eb023 c9f3c15a ce96cb0c d3655ec2 d5405925 d75a838d
    d84f691f d92f4cf1 dd32831e e041c609 e11dc1da e1b73076 e3ccbe1f e434dd97 e512a055 e6836793
    e84dde50 e9143a29 e9b64384 ebec03d8 ed45d626 ee6f01a9 eff26b18 f4a85a75 f50c51ed f5778592
    f59e28f8 f6952d6e fa1597ae fa7418ee fc3086f6 fcb7d8ae ff5ae7e8 ffeaa835
"""
_UNWANTED = frozenset(_UNWANTED_TEXT.split())


def _is_unwanted(word: str) -> bool:
    return hashlib.sha256(word.encode()).hexdigest()[:8] in _UNWANTED


def _shares(text_files: Sequence[Path]) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for path in text_files:
        counts.update(_WORD.findall(path.read_text()))
    total = counts.total()
    return {word: count / total for word, count in counts.items() if count >= _FEWEST}


def common_words(
    literary: Sequence[Path], technical: Sequence[Path], count: int = 3000, seed: int = 3
) -> list[str]:
    """The `count` most frequent lower-case words of 4 to 9 letters that both kinds of text use, in random order.

    Excludes function words, unwanted words and inflections of words already chosen.
    """
    first, second = _shares(literary), _shares(technical)
    ranked = sorted(first.keys() & second.keys(), key=lambda word: (-min(first[word], second[word]), word))
    chosen: dict[str, None] = {}
    for word in ranked:
        stems = {word.removesuffix(ending) for ending in ("s", "es", "d", "ed", "ing", "ly")} - {word}
        if word not in COMMON_WORDS and not _is_unwanted(word) and not stems & chosen.keys():
            chosen[word] = None
        if len(chosen) == count:
            break
    words = list(chosen)
    random.Random(seed).shuffle(words)
    return words
