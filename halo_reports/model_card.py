"""Model cards in Markdown for trained teachers and converted hybrids: `model_card.md.jinja`, filled from a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halo_reports.formatting import ABSENT, count, model_label, render
from halo_reports.outcome import PROXY_NOTE, headline, score_rows, selection_sentence, usage_snippet
from halo_reports.run_facts import RunFacts
from terminal_output import duration


@dataclass(frozen=True)
class DataSource:
    """One corpus: its origin, its licence, and the number of tokens used (None if unknown)."""

    name: str
    licence: str
    tokens: int | None = None
    note: str = ""


def model_card(
    run: RunFacts,
    *,
    title: str,
    config: Mapping[str, Any],
    parameters: int,
    licence: str,
    data: Sequence[DataSource],
    command: str,
    base_model: str | None = None,
    student: str | None = None,
    ngram_perplexity: float | None = None,
) -> str:
    """Card of a hybrid converted from `base_model`, or without it of a teacher trained from scratch.

    `config` is the exported config.json, `command` reproduces the run, `student` is the title of a hybrid's recurrent
    mixer. `ngram_perplexity` is the perplexity of an n-gram model on a teacher's held-out text.
    """
    evaluation, selection = run.evaluations.get("teacher"), run.selection
    choices = selection.choices.items() if selection else ()
    return render(
        "model_card.md.jinja",
        run=run,
        title=title,
        config=config,
        parameters=parameters,
        licence=licence,
        command=command,
        base_model=base_model,
        student=student,
        ngram_perplexity=ngram_perplexity,
        perplexity=evaluation.perplexity if evaluation else None,
        headline=headline(run),
        selection_sentence=selection_sentence(run),
        choices=[(model_label(method), ", ".join(map(str, layers)) or "none") for method, layers in choices],
        usage=usage_snippet("."),
        stages=_training_rows(run),
        losses=_loss_rows(run),
        data=[(one.name, one.licence, ABSENT if one.tokens is None else count(one.tokens), one.note) for one in data],
        proxy_note=PROXY_NOTE,
        scores=[(row.label, *row.texts) for row in score_rows(run)],
    )


def _training_rows(run: RunFacts) -> list[tuple[str, str, str]]:
    """Stage, wall time, and of a training its steps, tokens and final loss."""
    rows = []
    for record in run.stages:
        if not record.is_baseline:
            curve = run.curves.get(record.name)
            training = (
                f"{curve.steps[-1]:,} steps, {count(curve.consumed_tokens)} tokens, final loss {curve.final_loss:.4g}"
                if curve
                else ""
            )
            rows.append((record.name, duration(record.seconds), training))
    return rows


def _loss_rows(run: RunFacts) -> list[tuple[str, str]]:
    """The loss curve of a pre-training as eight rows: each is the mean loss since the row above."""
    curve = run.curves.get("pretrain")
    if curve is None:
        return []
    ends = sorted({max(1, part * len(curve.steps) // 8) for part in range(1, 9)})
    return [
        (f"{curve.steps[end - 1]:,}", f"{sum(curve.losses[start:end]) / (end - start):.4f}")
        for start, end in zip([0, *ends], ends, strict=False)
    ]
