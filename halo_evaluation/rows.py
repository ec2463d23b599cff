"""Rows of different lengths in padded batches, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from halo_evaluation.interface import ScoreBatch, TokenScores
from halo_evaluation.recall.materials import Segment, join

_PADDING = 0  # any valid id: nothing after a row's end can reach its scores


@dataclass(frozen=True)
class Row:
    """One sequence: ids int64 [length] and target mask bool [length]."""

    input_ids: np.ndarray
    target_mask: np.ndarray

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Row:
        """Answer segments are the targets."""
        return cls(*join(segments))


@dataclass(frozen=True)
class RowScores:
    """log_probability float32 [targets] and is_greedy bool [targets] of one row's target tokens."""

    log_probability: np.ndarray
    is_greedy: np.ndarray


def _by_length(rows: Sequence[Row]) -> list[int]:
    """Indices of rows, shortest first, ties in order."""
    return sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))


def _batch(rows: Sequence[Row]) -> ScoreBatch:
    shape = len(rows), max(len(row.input_ids) for row in rows)
    batch = ScoreBatch(np.full(shape, _PADDING, np.int64), np.zeros(shape, bool))
    for index, row in enumerate(rows):
        batch.input_ids[index, : len(row.input_ids)] = row.input_ids
        batch.target_mask[index, : len(row.input_ids)] = row.target_mask
    return batch


def batches_of(rows: Sequence[Row], tokens_per_batch: int) -> Iterator[ScoreBatch]:
    """Rows of similar length together, shortest first; a batch has one row or at most `tokens_per_batch` tokens."""
    waiting: list[Row] = []
    for row in (rows[index] for index in _by_length(rows)):
        if waiting and (len(waiting) + 1) * len(row.input_ids) > tokens_per_batch:
            yield _batch(waiting)
            waiting = []
        waiting.append(row)
    if waiting:
        yield _batch(waiting)


def scores_of(rows: Sequence[Row], scores: Sequence[TokenScores]) -> list[RowScores]:
    """Scores of each row's targets, in the order of `rows`, from those of the batches of `batches_of`."""
    order = _by_length(rows)
    scored = [
        (log_p, greedy)
        for batch in scores
        for log_p, greedy in zip(batch.log_probability, batch.is_greedy, strict=True)
    ]
    if len(scored) != len(rows):
        raise RuntimeError(f"{len(scored)} rows were scored where the task has {len(rows)}")
    result: dict[int, RowScores] = {}
    for index, (log_probability, is_greedy) in zip(order, scored, strict=True):
        targets = np.flatnonzero(rows[index].target_mask)
        result[index] = RowScores(log_probability[targets], is_greedy[targets])
    return [result[index] for index in range(len(rows))]
