"""Formats numbers and names for the report and for model cards, and fills their templates."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from terminal_output import duration

ABSENT = "-"

_METHOD_LABELS = {
    "halo": "HALO",
    "jet_nemotron": "Jet-Nemotron",
    "kl": "KL",
    "uniform": "Uniform",
    "last_half": "Last half",
    "all_rnn": "All RNN",
}
_MODEL_LABELS = {"teacher": "Teacher", "hybrid": "Hybrid"}


def model_label(model: str) -> str:
    """Display name of the teacher, the hybrid or a baseline. A baseline has the name of its selection method."""
    return _MODEL_LABELS.get(model) or method_label(model)


def method_label(method: str) -> str:
    """Display name of a selection method."""
    return _METHOD_LABELS.get(method, method)


def percent(share: float | None, digits: int = 1) -> str:
    return ABSENT if share is None else f"{100 * share:.{digits}f}%"


def decimals(number: float | None, digits: int = 2) -> str:
    return ABSENT if number is None else f"{number:.{digits}f}"


def moment(time: datetime) -> str:
    """2026-02-03 10:11 UTC."""
    return time.strftime("%Y-%m-%d %H:%M %Z").rstrip()


def count(number: float, kilo: int = 1000) -> str:
    """512, 8K, 1.5M; `kilo` 1024 for context lengths."""
    for unit, suffix in ((kilo**3, "B"), (kilo**2, "M"), (kilo, "K")):
        if number >= unit:
            scaled = number / unit
            return (
                f"{scaled:.0f}{suffix}" if scaled >= 100 or scaled == int(scaled) else f"{scaled:.3g}{suffix}"
            )
    return f"{number:g}"


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def render(template: str, **content: Any) -> str:
    """Fill a template of this package; in .html files the content is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for formatter in (percent, decimals, duration, count, moment, model_label):
        environment.filters[formatter.__name__] = formatter
    environment.filters |= {"cell": _cell, "json": json.dumps}  # JSON strings are valid YAML
    return environment.get_template(template).render(content)
