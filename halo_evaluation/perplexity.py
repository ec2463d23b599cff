"""Perplexity of held-out text in disjoint windows of one length."""

from __future__ import annotations

import numpy as np

from halo_evaluation.recall.materials import TokenSource
from halo_evaluation.rows import TokenRow
from halo_evaluation.tasks import PerplexityTask

NAME = "local_perplexity"


def perplexity_task(source: TokenSource, context_length: int, windows: int) -> PerplexityTask:
    """At most `windows` disjoint windows of `context_length` tokens, spread evenly over `source`.

    ValueError if `source` is shorter than one window.
    """
    available = source.num_tokens // context_length
    if available == 0:
        raise ValueError(
            f"{NAME}: the held-out text has {source.num_tokens} tokens, but context_length is"
            f" {context_length}; hold out more text or evaluate shorter contexts"
        )
    chosen = np.linspace(0, available - 1, min(windows, available)).round().astype(int)
    targets = np.arange(context_length) > 0
    rows = [
        TokenRow(source.read(int(n) * context_length, context_length).astype(np.int64), targets) for n in chosen
    ]
    return PerplexityTask(NAME, "perplexity", rows)
