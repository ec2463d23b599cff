"""Attention layers of the main hybrid, and of the baselines that differ from it only in these."""

from __future__ import annotations

from halo_evaluation.results import Selection
from halo_jobs.plan import MAIN_VARIANT
from halo_jobs.stages.context import StageContext


def attention_layers_of(context: StageContext) -> tuple[int, ...]:
    """Attention layers of this stage's variant, counted from 0, as the select stage chose them."""
    selection = Selection.read(context.before("select"))
    return selection.layers_of(None if context.variant == MAIN_VARIANT else context.variant)
