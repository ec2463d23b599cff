"""Model cards in Markdown for trained teachers and converted hybrids, from the files of their runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halo_reports.formatting import ABSENT, count, decimals, model_label
from halo_reports.outcome import (
    PROXY_NOTE,
    headline,
    score_rows,
    selection_sentence,
    training_summary,
    usage_snippet,
)
from halo_reports.run_facts import RunFacts
from terminal_output import duration

TEACHER_LIMITATIONS = """## Limitations

- This model is a teacher for testing conversions, not an assistant. Its corpora are small, and it knows little of the
  world.
- It learned recall from generated tasks within its training context. Expect none beyond that length.
- It has no instruction tuning and no safety tuning."""

HYBRID_LIMITATIONS = """## Limitations

- It has the limitations of its teacher, including a lack of safety tuning. Conversion adds no knowledge.
- Recurrent layers keep a state of constant size, so the recall of many facts may degrade sooner than in the teacher.
- The folder contains modelling code, so loading it requires `trust_remote_code=True`. Read the code first."""

CODE_LICENCE = """## Licence

The front matter names the licence of the weights. The modelling code in this folder is part of
hypenet-megatron and has the Apache License 2.0."""


@dataclass(frozen=True)
class DataSource:
    """One corpus: its origin, its licence, and the number of tokens used (None if unknown)."""

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

    `config` is its Hugging Face config.json, `command` reproduces the training, `ngram_perplexity` is the perplexity of
    an n-gram model on the same held-out text. Raises ValueError if `config` lacks a dimension.
    """
    evaluation = run.evaluations.get("teacher")
    baseline = []
    if ngram_perplexity is not None:
        perplexity = decimals(evaluation.perplexity if evaluation else None)
        baseline = [
            f"On the same held-out text the perplexity of an n-gram model is {decimals(ngram_perplexity)}, "
            f"that of this model {perplexity}."
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

    `config` is its exported config.json, `student` the title of its recurrent mixer, `command` reproduces the
    conversion. Raises ValueError if `config` lacks a dimension.
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
        setting = "turned it off" if calibration.base is None else f"chose a = {calibration.base:g}"
        sections.append(
            "At inference HypeNet can scale attention queries by log(t + a) / log(a) at position t. "
            f"Calibration on long documents {setting}."
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
    """The YAML header for model hubs. JSON strings are valid YAML."""
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
            f"config.json has no {error}, which the model card needs; export the model again"
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
    """The loss curve as eight rows: each is the mean loss since the row above."""
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
        ("Ranking", "Attention layers"),
        [
            (model_label(method), ", ".join(map(str, layers)) or "none")
            for method, layers in run.selection.choices.items()
        ],
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
