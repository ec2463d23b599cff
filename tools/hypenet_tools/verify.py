"""Compares two models: every tensor bit for bit, under Hugging Face names, and logits on fixed prompts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from hypenet_tools.open_model import OpenedModel
from sharded_tensors.views import BLOCK_BYTES, TensorView
from sharded_tensors.writer import Advance

# Two implementations of one model differ by rounding. A wrong weight or a swapped head differs far more.
LOGIT_TOLERANCE = 1e-3  # of the largest logit
LISTED = 20


def verify(a: OpenedModel, b: OpenedModel, *, advance: Advance = lambda count: None) -> dict[str, Any]:
    """Compare two models. The report (JSON) has "match" and every difference.

    `advance` is called with the bytes of each pair of tensors once they are compared. If the models do not fit into
    memory, the report has the reason instead of logits.
    """
    one, other = a.hugging_face(), b.hugging_face()
    common = [name for name in one if name in other]
    differing = compare_tensors(one, other, advance)
    damaged = {str(model.folder): files for model in (a, b) if (files := model.damaged_files())}
    report: dict[str, Any] = {
        "a": str(a.folder),
        "b": str(b.folder),
        "model": _model_differences(a, b),
        "tensors": {
            "compared": len(common),
            "equal": len(common) - len(differing),
            "differing": differing[:LISTED],
            "only_in_a": [name for name in one if name not in other][:LISTED],
            "only_in_b": [name for name in other if name not in one][:LISTED],
        },
        "files_not_matching_their_checksum": damaged,
    }
    same = len(common) == len(one) == len(other) and not differing
    report["logits"] = logits = _logits(a, b, report["model"])
    close = "skipped" in logits or logits["max_difference"] <= LOGIT_TOLERANCE * logits["largest"]
    report["match"] = same and close and not report["model"] and not damaged
    return report


def _logits(a: OpenedModel, b: OpenedModel, differences: list[dict[str, Any]]) -> dict[str, Any]:
    if {"shape", "mixer_types"} & {entry["what"] for entry in differences}:
        return {"skipped": "not computed: the models differ in shape"}
    from hypenet_tools.logits import compare_logits  # Megatron and transformers take seconds to import

    return compare_logits(a, b)


def compare_tensors(
    one: TensorView, other: TensorView, advance: Advance = lambda count: None
) -> list[dict[str, Any]]:
    """List the tensors that both models have and that differ in shape, dtype or any bit."""
    found = (_difference(name, one, other, advance) for name in one if name in other)
    return [difference for difference in found if difference is not None]


def _model_differences(a: OpenedModel, b: OpenedModel) -> list[dict[str, Any]]:
    pairs: dict[str, list[Any]] = {
        "shape": [{**asdict(model.shape), "name": ""} for model in (a.model, b.model)],
        "mixer_types": [a.model.mixer_types, b.model.mixer_types],
        "logits_scaling_base": [a.model.logits_scaling_base, b.model.logits_scaling_base],
    }
    return [{"what": what, "a": one, "b": other} for what, (one, other) in pairs.items() if one != other]


def _difference(name: str, one: TensorView, other: TensorView, advance: Advance) -> dict[str, Any] | None:
    """The difference of the tensor `name` in the two views, or None if it is equal."""
    mine, theirs = one.infos[name], other.infos[name]
    if mine.shape != theirs.shape:
        advance(mine.nbytes)
        return {"name": name, "shape": [mine.shape, theirs.shape]}
    largest, equal = 0.0, mine.dtype == theirs.dtype
    rows = max(1, BLOCK_BYTES // (mine.columns * mine.dtype.itemsize))
    for start in range(0, mine.rows, rows):
        stop = min(start + rows, mine.rows)
        left, right = (torch.cat(list(view.rows(name, start, stop))) for view in (one, other))
        if left.dtype != right.dtype or not left.view(torch.uint8).equal(right.view(torch.uint8)):
            equal = False
            largest = max(largest, float((left.float() - right.float()).abs().max()))
        advance(left.nbytes)
    if equal:
        return None
    return {"name": name, "dtype": [str(mine.dtype), str(theirs.dtype)], "max_difference": largest}
