"""Variants: the main hybrid and the baselines that differ from it only in which layers stay attention."""

from __future__ import annotations

from halo_evaluation.results import Selection
from halo_jobs.stages.context import StageContext

MAIN_VARIANT = "hybrid"


def variant_of(context: StageContext) -> str:
    """`distill.uniform` is the distill stage of variant uniform."""
    return context.name.partition(".")[2]


def attention_layers_of(context: StageContext) -> tuple[int, ...]:
    """0-based attention layers of this stage's variant, as the select stage decided."""
    variant = variant_of(context)
    selection = Selection.read(context.inputs["select"])
    return selection.layers_of(None if variant == MAIN_VARIANT else variant)
