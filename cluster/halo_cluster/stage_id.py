"""The name of a stage: its kind, and for some kinds a variant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class StageId:
    """As text "align", or "distill.uniform" for the variant "uniform" of the kind "distill"."""

    kind: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> StageId:
        kind, _, variant = text.partition(".")
        return cls(kind, variant)

    def __str__(self) -> str:
        return f"{self.kind}.{self.variant}" if self.variant else self.kind
