"""Token rows of different lengths: into padded batches, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from halo_evaluation.interface import ScoreBatch, TokenScores
from halo_evaluation.recall.materials import Segment, join

_PADDING = 0  # any valid id will do: tokens after the end of a row do not affect its scores


@dataclass(frozen=True)
class TokenRow:
    """One sequence: input_ids int64 [length] and target_mask bool [length]."""

    input_ids: np.ndarray
    target_mask: np.ndarray

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> TokenRow:
        """Join segments. Answers are the targets."""
        return cls(*join(segments))


def _by_length(rows: Sequence[TokenRow]) -> list[int]:
    """Indices of the rows, shortest first; rows of equal length in their order."""
    return sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))


def _batch(rows: Sequence[TokenRow]) -> ScoreBatch:
    shape = len(rows), max(len(row.input_ids) for row in rows)
    batch = ScoreBatch(np.full(shape, _PADDING, np.int64), np.zeros(shape, bool))
    for index, row in enumerate(rows):
        batch.input_ids[index, : len(row.input_ids)] = row.input_ids
        batch.target_mask[index, : len(row.input_ids)] = row.target_mask
    return batch


def batches_of(rows: Sequence[TokenRow], tokens_per_batch: int) -> Iterator[ScoreBatch]:
    """Batches of rows of similar length, shortest first: at most `tokens_per_batch` tokens with padding, or one row."""
    waiting: list[TokenRow] = []
    for row in (rows[index] for index in _by_length(rows)):
        if waiting and (len(waiting) + 1) * len(row.input_ids) > tokens_per_batch:
            yield _batch(waiting)
            waiting = []
        waiting.append(row)
    if waiting:
        yield _batch(waiting)


def scores_of(rows: Sequence[TokenRow], scores: Sequence[TokenScores]) -> list[TokenScores]:
    """Scores [targets] of each row, in the order of `rows`; `scores` are those of the batches of `batches_of`."""
    order = _by_length(rows)
    scored = [
        (log_p, greedy)
        for batch in scores
        for log_p, greedy in zip(batch.log_probability, batch.is_greedy, strict=True)
    ]
    if len(scored) != len(rows):
        raise RuntimeError(f"{len(scored)} rows were scored, but the task has {len(rows)}")
    result: dict[int, TokenScores] = {}
    for index, (log_probability, is_greedy) in zip(order, scored, strict=True):
        targets = np.flatnonzero(rows[index].target_mask)
        result[index] = TokenScores(log_probability[targets], is_greedy[targets])
    return [result[index] for index in range(len(rows))]
