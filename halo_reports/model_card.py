"""Model cards in Markdown for trained teachers and converted hybrids, from what their runs left on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halo_reports.formatting import ABSENT, count, decimals, duration, model_label
from halo_reports.outcome import (
    PROXY_NOTE,
    headline,
    score_rows,
    selection_sentence,
    training_summary,
    usage_snippet,
)
from halo_reports.run_facts import RunFacts

TEACHER_LIMITATIONS = """## Limitations

- A teacher for testing conversions, not an assistant: it knows the style of its small corpora and little of
  the world.
- Generated tasks taught it to recall within its training context; it is not expected to recall beyond.
- It has had no instruction tuning and no safety tuning."""

HYBRID_LIMITATIONS = """## Limitations

- It has every gap of its teacher, and its teacher's lack of safety tuning; conversion adds no knowledge.
- Recurrent layers keep a state of constant size, so recall of many facts at once may fall sooner than in the
  teacher.
- The folder contains its own modelling code, so loading it needs `trust_remote_code=True`; read it first."""

CODE_LICENCE = """## Licence

The weights have the licence that the front matter names. The modelling code in this folder is part of
hypenet-megatron and has the Apache License 2.0."""


@dataclass(frozen=True)
class DataSource:
    """One corpus: its origin, its licence, and how many tokens of it were used (None if unknown)."""

    name: str
    licence: str
    tokens: int | None = None
    note: str = ""


def teacher_model_card(
    run: RunFacts,
    *,
    title: str,
    config: Mapping[str, Any],
    parameters: int,
    licence: str,
    data: Sequence[DataSource],
    command: str,
    ngram_perplexity: float | None = None,
) -> str:
    """Card of a teacher trained from scratch.

    `config` is its Hugging Face config.json, `command` the line that trains it again, `ngram_perplexity` that
    of an n-gram model on the same held-out text. Raises ValueError when `config` lacks a dimension.
    """
    evaluation = run.evaluations.get("teacher")
    baseline = []
    if ngram_perplexity is not None:
        perplexity = decimals(evaluation.perplexity if evaluation else None)
        baseline = [
            f"On the same held-out text an n-gram model has a perplexity of {decimals(ngram_perplexity)}, "
            f"this model one of {perplexity}."
        ]
    return _card(
        _front_matter(licence, ["qwen3", "teacher"]),
        f"# {title}",
        "A small language model of the Qwen3 architecture, trained from scratch as a teacher for HALO. "
        + headline(run),
        _dimensions(config, parameters),
        *_use("."),
        *_training(run, command),
        _loss_table(run, "pretrain"),
        *_data(data),
        *_scores(run),
        *baseline,
        TEACHER_LIMITATIONS,
    )


def hybrid_model_card(
    run: RunFacts,
    *,
    title: str,
    base_model: str,
    config: Mapping[str, Any],
    student: str,
    parameters: int,
    licence: str,
    data: Sequence[DataSource],
    command: str,
) -> str:
    """Card of a HypeNet hybrid converted from `base_model`.

    `config` is its exported config.json, `student` the title of its recurrent mixer, `command` the line that converts
    it again. Raises ValueError when `config` lacks a dimension.
    """
    sections = []
    if run.selection is not None:
        sections = [
            "## Architecture and layer selection",
            f"{selection_sentence(run)} The other layers are {student}, a linear recurrence with a state of "
            "constant size. Attention layers have no position encoding, recurrent layers have RoPE.",
            _choices_table(run),
        ]
    calibration = run.calibrations.get("hybrid")
    if calibration is not None:
        setting = "it is off" if calibration.base is None else f"it has the base a = {calibration.base:g}"
        sections.append(
            "HypeNet can scale attention queries by log(t + a) / log(a) at position t, at inference only. "
            f"Calibrated on long documents, {setting} here."
        )
    return _card(
        _front_matter(licence, ["hypenet", "hybrid", "linear-attention", "distillation"], base_model),
        f"# {title}",
        f"A HypeNet hybrid converted from {base_model} with HALO. {headline(run)}",
        _dimensions(config, parameters),
        *_use("."),
        *sections,
        *_training(run, command),
        *_data(data),
        *_scores(run),
        HYBRID_LIMITATIONS,
        CODE_LICENCE,
    )


def _card(*blocks: str) -> str:
    return "\n\n".join(block for block in blocks if block) + "\n"


def _front_matter(licence: str, tags: Sequence[str], base_model: str | None = None) -> str:
    """The YAML header that model hubs read; JSON strings are valid YAML."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"license: {json.dumps(licence)}",
    ]
    if base_model is not None:
        lines.append(f"base_model: {json.dumps(base_model)}")
    return "\n".join([*lines, f"tags: {json.dumps(list(tags))}", "---"])


def _dimensions(config: Mapping[str, Any], parameters: int) -> str:
    try:
        return (
            f"{count(parameters)} parameters: {config['num_hidden_layers']} layers, hidden size "
            f"{config['hidden_size']}, feed-forward size {config['intermediate_size']}, "
            f"{config['num_attention_heads']} query and {config['num_key_value_heads']} key/value heads of "
            f"{config['head_dim']}, vocabulary of {config['vocab_size']:,} tokens."
        )
    except KeyError as error:
        raise ValueError(
            f"the model card needs {error} of the model's config.json; export the model again"
        ) from None


def _use(folder: str) -> list[str]:
    return ["## Use", "In the folder of this card:", f"```python\n{usage_snippet(folder)}\n```"]


def _training(run: RunFacts, command: str) -> list[str]:
    stages = [record for record in run.stages if not record.is_baseline]
    rows = [(record.name, duration(record.seconds), _training_cell(run, record.name)) for record in stages]
    return [
        "## How it was made",
        f"```\n{command}\n```",
        _table(("Stage", "Wall time", "Training"), rows) if rows else "",
    ]


def _training_cell(run: RunFacts, stage: str) -> str:
    return training_summary(run, stage) if stage in run.curves else ""


def _loss_table(run: RunFacts, stage: str) -> str:
    """The training curve in eight rows, each the mean loss of the steps since the row above."""
    curve = run.curves.get(stage)
    if curve is None:
        return ""
    ends = sorted({max(1, part * len(curve.steps) // 8) for part in range(1, 9)})
    rows = [
        (f"{curve.steps[end - 1]:,}", f"{sum(curve.losses[start:end]) / (end - start):.4f}")
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return _table(("Up to step", "Mean training loss, nats per token"), rows)


def _data(data: Sequence[DataSource]) -> list[str]:
    rows = [
        (source.name, source.licence, ABSENT if source.tokens is None else count(source.tokens), source.note)
        for source in data
    ]
    return ["## Data", _table(("Source", "Licence", "Tokens", "Note"), rows)] if rows else []


def _scores(run: RunFacts) -> list[str]:
    rows = [(row.label, *row.texts) for row in score_rows(run)]
    if not rows:
        return []
    table = _table(("Task", *(model_label(model) for model in run.evaluations)), rows)
    return ["## Scores (local proxies)", PROXY_NOTE, table]


def _choices_table(run: RunFacts) -> str:
    assert run.selection is not None
    return _table(
        ("Ranking", "Attention layers it would choose"),
        [
            (model_label(method), ", ".join(map(str, layers)) or "none")
            for method, layers in run.selection.choices.items()
        ],
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
