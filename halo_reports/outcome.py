"""The results of a conversion: sentences, tables and code that the report and the model cards share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halo_reports.formatting import ABSENT, decimals, method_label, model_label, percent
from halo_reports.run_facts import RunFacts

PROXY_NOTE = (
    "All scores are local proxies: tasks that this project generates from held-out text and random keys. "
    "They compare the models of one run, and are not the published benchmarks of similar names."
)


@dataclass(frozen=True)
class ScoreRow:
    """One row of the score table: a text per model, and the columns of the best converted models."""

    label: str
    group: str
    texts: tuple[str, ...]
    best: frozenset[int]


def headline(run: RunFacts) -> str:
    """The result in one sentence: the hybrid compared with its teacher, or the teacher alone."""
    teacher, hybrid = run.evaluations.get("teacher"), run.evaluations.get("hybrid")
    subject, reference = (hybrid, teacher) if hybrid else (teacher, None)
    if subject is None:
        return f"Run {run.name}: neither teacher nor hybrid has been evaluated yet."
    facts = []
    limit = run.fair_context or 0
    recall = subject.needle_recall(0, limit)
    if recall is not None:
        against = f" against the teacher's {percent(reference.needle_recall(0, limit))}" if reference else ""
        facts.append(f"finds {percent(recall)} of needles{against} within {limit:,} tokens")
    if subject.perplexity is not None:
        against = f" against {decimals(reference.perplexity)}" if reference else ""
        facts.append(f"has a held-out perplexity of {decimals(subject.perplexity)}{against}")
    name = f"the {model_label(subject.model).lower()}"
    if hybrid and run.selection:
        kept, layers = len(run.selection.attention_layers), run.selection.sweep.num_layers
        name = f"with softmax attention in {kept} of {layers} layers ({percent(kept / layers, 0)}), {name}"
    return f"{name[0].upper()}{name[1:]} {' and '.join(facts) or 'has no needle or perplexity score'}."


def baseline_sentence(run: RunFacts) -> str:
    """Needle recall of the baselines at the same context lengths; empty without baselines."""
    scores = [
        f"{model_label(model)} {percent(evaluation.needle_recall(0, run.fair_context or 0))}"
        for model, evaluation in run.evaluations.items()
        if model not in ("teacher", "hybrid")
    ]
    if not scores:
        return ""
    return (
        f"Baselines with other attention layers, at the same context lengths: {', '.join(scores)}."
    )


def selection_sentence(run: RunFacts) -> str:
    """Which layers keep attention and which ranking selected them; empty before selection."""
    if run.selection is None:
        return ""
    layers = ", ".join(map(str, run.selection.attention_layers)) or "none"
    return (
        f"Layers {layers} of {run.selection.sweep.num_layers} (counted from 0) keep softmax attention, "
        f"selected by the {method_label(run.selection.method)} ranking."
    )


def score_rows(run: RunFacts) -> tuple[ScoreRow, ...]:
    """Needle recall within and beyond the training context, all tasks, and perplexity; one column per model."""
    evaluations = list(run.evaluations.values())
    rows = []
    limit = run.fair_context or 0
    longest = max((cell.context_length for evaluation in evaluations for cell in evaluation.niah), default=0)
    for label, shortest, end in (
        (f"Needles found, up to {limit:,} tokens", 0, limit),
        (f"Needles found, {limit + 1:,} to {longest:,} tokens", limit + 1, longest),
    ):
        shares = [evaluation.needle_recall(shortest, end) for evaluation in evaluations]
        rows.append(ScoreRow(label, "", tuple(map(percent, shares)), _best(run, shares, 1)))
    for task in dict.fromkeys(task for evaluation in evaluations for task in evaluation.tasks):
        metrics = [evaluation.tasks.get(task, {}) for evaluation in evaluations]
        shares = [entry.get("score") for entry in metrics]
        group = next((str(entry["group"]) for entry in metrics if "group" in entry), "")
        if group != "perplexity":
            rows.append(ScoreRow(task, group, tuple(map(percent, shares)), _best(run, shares, 1)))
    perplexities = [evaluation.perplexity for evaluation in evaluations]
    texts = tuple(map(decimals, perplexities))
    rows.append(ScoreRow("Held-out perplexity (lower is better)", "", texts, _best(run, perplexities, -1)))
    return tuple(row for row in rows if any(text != ABSENT for text in row.texts))


def _best(run: RunFacts, values: Sequence[float | None], sign: int) -> frozenset[int]:
    """Columns of the best converted models. The teacher does not compete, and neither does a single model."""
    contest = {
        column: sign * value
        for column, (model, value) in enumerate(zip(run.evaluations, values, strict=True))
        if model != "teacher" and value is not None
    }
    if len(contest) < 2:
        return frozenset()
    return frozenset(column for column, value in contest.items() if value == max(contest.values()))


def usage_snippet(model_folder: Path | str) -> str:
    """Python that loads an exported model and continues a prompt."""
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {json.dumps(str(model_folder), ensure_ascii=False)}
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("The state of the Union is", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(tokens[0]))"""
