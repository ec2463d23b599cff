"""Figures of the report: matplotlib drawings as inline SVG in the light or dark colours of the page.

A figure is drawn with placeholder colours, one per role, that are replaced by CSS variables of the page. Text remains
text, in the font of the page. Sizes are CSS pixels.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from halo_evaluation.results import Evaluation, Selection
from halo_reports.formatting import count, method_label, model_label, percent
from halo_reports.run_facts import Calibration, RunFacts, TrainingCurve

# Role -> CSS value. The placeholder colours are never seen.
_ROLES = {
    "ink": "var(--ink)",
    "muted": "var(--muted)",
    "rule": "var(--rule)",
    "accent": "var(--accent)",
    "on_accent": "var(--on-accent)",
    "quiet": "var(--quiet)",
    "teacher": "var(--series-teacher)",
    "hybrid": "var(--series-hybrid)",
    "uniform": "var(--series-uniform)",
    "last_half": "var(--series-last-half)",
    "all_rnn": "var(--series-all-rnn)",
    "other": "var(--muted)",
}
_PLACEHOLDERS = {role: f"#000a{number:02x}" for number, role in enumerate(_ROLES, start=1)}
_MARKERS = {
    "teacher": ("o", "-"),
    "hybrid": ("o", "-"),
    "uniform": ("s", "--"),
    "last_half": ("^", "-."),
    "all_rnn": ("D", ":"),
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in the name of a model is a dollar sign
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 11,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "text.color": _PLACEHOLDERS["ink"],
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _PLACEHOLDERS["rule"]),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _PLACEHOLDERS["muted"]),
}
_CURVE_POINTS = 240
_DOTTED = (0, (2, 2))


def _colour(role: str) -> str:
    return _PLACEHOLDERS.get(role, _PLACEHOLDERS["other"])


def _series(model: str, marker_size: int) -> dict[str, Any]:
    """How the line of a model is drawn."""
    marker, line = _MARKERS.get(model, ("v", "--"))
    return {
        "color": _colour(model),
        "marker": marker,
        "markersize": marker_size,
        "linestyle": line,
        "label": model_label(model),
    }


@contextmanager
def _figure(width: int, height: int) -> Iterator[Figure]:
    """A figure of width x height CSS pixels (the SVG unit is 1/72 inch), in the style of the report."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width / 72, height / 72), layout="constrained")


def _inline_svg(figure: Figure, description: str) -> Markup:
    """The figure as an <svg> element for an HTML page, without XML header, metadata or namespaces."""
    buffer = io.StringIO()
    hidden = {"Date": None, "Creator": None, "Format": None, "Type": None}
    salt: dict[Any, Any] = {"svg.hashsalt": description}  # equal parts of two figures must not share an id
    with mpl.rc_context(salt):
        figure.savefig(buffer, format="svg", transparent=True, metadata=hidden)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure, and never referred to
    for role, placeholder in _PLACEHOLDERS.items():
        text = text.replace(placeholder, _ROLES[role])
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--sans)", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    width, height = (round(size * 72) for size in figure.get_size_inches())
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1))


def _means(values: Sequence[float]) -> list[float]:
    """At most _CURVE_POINTS points, each the mean of as many consecutive values."""
    size = math.ceil(len(values) / _CURVE_POINTS)
    parts = (values[start : start + size] for start in range(0, len(values), size))
    return [sum(part) / len(part) for part in parts]


def _ticks_at(axes: Axes, values: Sequence[float], text: Callable[[float], str]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def loss_curves(title: str, loss_name: str, curves: Mapping[str, TrainingCurve]) -> Markup:
    """Loss against step, one line per model; `curves` is keyed by model."""
    with _figure(340, 230) as figure:
        axes = figure.subplots()
        for model, curve in curves.items():
            main = model in ("", "hybrid", "teacher")
            axes.plot(
                _means(curve.steps),
                _means(curve.losses),
                color=_colour(model or "hybrid"),
                linestyle="-" if main else _MARKERS.get(model, ("o", "--"))[1],
                linewidth=1.8 if main else 1.2,
                zorder=3 if main else 2,
                label=model_label(model or "hybrid"),
            )
        losses = [loss for curve in curves.values() for loss in curve.losses if loss > 0]
        if losses and max(losses) > 8 * min(losses):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("step")
        axes.set_ylabel(loss_name)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(round(value))))
        axes.margins(x=0.02)
        if len(curves) > 1:
            axes.legend(loc="upper right", handlelength=2.2, labelspacing=0.25, borderaxespad=0.1)
        ends = "; ".join(
            f"{model_label(model)} ends at {curve.final_loss:.4g}" for model, curve in curves.items() if model
        )
        return _inline_svg(figure, f"{title}: {loss_name} against step. {ends}")


def layer_importance(selection: Selection) -> Markup:
    """Importance of every layer as bars, above the layers that every method would select."""
    layers = range(selection.sweep.num_layers)
    chosen = set(selection.attention_layers)
    heights = [0.0 if value is None else value for value in selection.importance]
    methods = list(selection.choices)
    ranked = any(value is not None for value in selection.importance)
    with _figure(1032, (210 if ranked else 0) + 34 + 22 * len(methods)) as figure:
        if ranked:
            bars, strip = figure.subplots(2, 1, sharex=True, height_ratios=[200, 10 + 22 * len(methods)])
            colours = [_colour("accent" if layer in chosen else "quiet") for layer in layers]
            bars.bar(list(layers), heights, width=0.72, color=colours)
            _label_bars(bars, heights, chosen)
            # The cap of 50 is far above the layers that compete for the last places: a linear scale would hide them.
            bars.set_yscale("function", functions=(_signed_root, _signed_square))
            bars.set_ylabel(f"{method_label(selection.method)} importance\n(square-root scale)")
            bars.set_ylim(min(0.0, *heights), (max(heights) or 1.0) * 1.25)
            bars.tick_params(axis="x", length=0)
        else:
            strip = figure.subplots()
        _choice_strip(strip, selection, methods)
        strip.set_xlim(-0.7, len(layers) - 0.3)
        kept = ", ".join(map(str, sorted(chosen)))
        return _inline_svg(figure, f"Importance of each layer; layers {kept} keep attention")


def _signed_root(values: Any) -> Any:
    return np.copysign(np.sqrt(np.abs(values)), values)


def _signed_square(values: Any) -> Any:
    return np.copysign(np.square(values), values)


def _label_bars(axes: Axes, heights: Sequence[float], chosen: set[int]) -> None:
    crowded = len(heights) > 40
    for layer, height in enumerate(heights):
        if crowded and layer not in chosen:
            continue
        axes.annotate(
            f"{height:.2g}" if abs(height) < 10 else f"{height:.0f}",
            (layer, max(height, 0.0)),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            color=_colour("ink" if layer in chosen else "muted"),
        )


def _choice_strip(axes: Axes, selection: Selection, methods: Sequence[str]) -> None:
    layers = range(selection.sweep.num_layers)
    for row, method in enumerate(methods):
        used, kept = method == selection.method, selection.choices[method]
        others = [layer for layer in layers if layer not in kept]
        colour = _colour("accent" if used else "muted")
        axes.scatter(kept, [row] * len(kept), s=62, marker="s", linewidths=0, color=colour)
        axes.scatter(others, [row] * len(others), s=5, marker="o", linewidths=0, color=_colour("rule"))
    labels = [method_label(method) + (" (used)" if method == selection.method else "") for method in methods]
    axes.set_yticks(range(len(methods)), labels)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    _remove_frame(axes)
    axes.set_xlabel("layer; a square marks softmax attention")
    axes.set_xticks(layers[:: max(1, math.ceil(len(layers) / 36))])


def _remove_frame(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(axis="both", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)


def niah_heat_map(evaluation: Evaluation, task: str | None = None) -> Markup:
    """Per cent of needles found by context (columns) and depth (rows), over all tasks or one."""
    found: dict[tuple[int, float], list[float]] = {}
    for cell in evaluation.niah:
        if task is None or cell.task == task:
            tally = found.setdefault((cell.context_length, cell.depth), [0.0, 0.0])
            tally[0] += cell.score * cell.items
            tally[1] += cell.items
    contexts = sorted({context for context, _ in found})
    depths = sorted({depth for _, depth in found})
    with _figure(330, 52 + 25 * len(depths)) as figure:
        axes = figure.subplots()
        for (context, depth), (score, items) in found.items():
            share = score / items
            column, row = contexts.index(context), depths.index(depth)
            shade: dict[str, Any] = {"color": _colour("accent"), "alpha": 0.06 + 0.94 * share}
            axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, lw=0, **shade))
            ink = _colour("on_accent" if share > 0.66 else "ink")
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=10.5, color=ink)
        trained = sum(context <= evaluation.training_context for context in contexts)
        axes.axvline(trained - 0.5, color=_colour("ink"), linewidth=1.6, ymin=-0.02, ymax=1.02, clip_on=False)
        axes.set_xlim(-0.5, len(contexts) - 0.5)
        axes.set_ylim(len(depths) - 0.5, -0.5)
        axes.set_xticks(range(len(contexts)), [count(context, 1024) for context in contexts])
        axes.set_yticks(range(len(depths)), [percent(depth, 0) for depth in depths])
        _remove_frame(axes)
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("depth")
        where = task or "all needle tasks"
        return _inline_svg(figure, f"{model_label(evaluation.model)}, {where}: per cent of needles found")


def niah_by_context(run: RunFacts) -> Markup:
    """Per cent of needles found against context length, one line per model."""
    evaluations = [evaluation for evaluation in run.evaluations.values() if evaluation.niah]
    with _figure(1032, 250) as figure:
        axes = figure.subplots()
        for evaluation in evaluations:
            contexts = evaluation.niah_contexts
            shares = [100 * (evaluation.needle_recall(context, context) or 0.0) for context in contexts]
            zorder = 4 if evaluation.model == "hybrid" else 3
            axes.plot(contexts, shares, zorder=zorder, clip_on=False, **_series(evaluation.model, 5))
        for trained in sorted({evaluation.training_context for evaluation in evaluations}):
            axes.axvline(trained, color=_colour("muted"), linewidth=1, linestyle=_DOTTED, zorder=1)
        axes.set_xscale("log", base=2)
        measured = sorted({context for evaluation in evaluations for context in evaluation.niah_contexts})
        _ticks_at(axes, measured, lambda value: count(round(value), 1024))
        axes.set_ylim(0, 100)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.set_xlabel("context, tokens; dotted line: training context")
        axes.set_ylabel("needles found, %")
        figure.legend(loc="outside right upper", handlelength=2.6, labelspacing=0.6)
        return _inline_svg(figure, "Per cent of needles found against context length, one line per model")


def calibration_curve(calibrations: Mapping[str, Calibration]) -> Markup:
    """Loss on long documents against the base of the logits scaling. A ring marks the chosen base."""
    with _figure(430, 230) as figure:
        axes = figure.subplots()
        for model, calibration in calibrations.items():
            losses = {base: loss for base, loss in calibration.candidates if base is not None}
            axes.plot(sorted(losses), [losses[base] for base in sorted(losses)], **_series(model, 4))
            colour = _colour(model)
            for base, loss in calibration.candidates:
                if base is None:
                    off = f"{model_label(model)}, off"
                    axes.axhline(loss, color=colour, linewidth=1, linestyle=_DOTTED, label=off)
                elif base == calibration.base:
                    ring: dict[str, Any] = {"marker": "o", "markersize": 12, "markerfacecolor": "none"}
                    axes.plot(base, loss, markeredgecolor=colour, ls="", **ring)
        axes.set_xscale("log")
        bases = sorted(
            {base for item in calibrations.values() for base, _ in item.candidates if base is not None}
        )
        _ticks_at(axes, bases, lambda value: f"{value:g}")
        axes.set_xlabel("base a of s(t) = log(t + a) / log(a)")
        axes.set_ylabel("loss, nats per token")
        axes.legend(loc="best", handlelength=2.4, labelspacing=0.3)
        return _inline_svg(figure, "Loss on long documents against the base of the logits scaling")
