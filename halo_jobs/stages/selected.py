"""Variants: the main hybrid and the baselines that differ from it only in which layers stay attention."""

from __future__ import annotations

from durable_files import read_json
from halo_jobs.stages.context import StageContext

MAIN_VARIANT = "hybrid"


def variant_of(context: StageContext) -> str:
    """`distill.uniform` is the distill stage of variant uniform."""
    return context.name.partition(".")[2]


def attention_layers_of(context: StageContext) -> tuple[int, ...]:
    """0-based attention layers of this stage's variant, as the select stage decided."""
    selection = read_json(context.inputs["select"] / "selection.json")
    variant = variant_of(context)
    layers = selection["attention_layers"] if variant == MAIN_VARIANT else selection["choices"][variant]
    return tuple(layers)
