"""The mixers, one MixerSpec each. What depends on the kind of mixer is in its spec; no other code branches on it."""

from __future__ import annotations

import difflib
import importlib

from hypenet_megatron.mixers.lightning import LIGHTNING
from hypenet_megatron.mixers.softmax_attention import HYBRID_ATTENTION, QWEN3_ATTENTION
from hypenet_megatron.mixers.spec import MixerSpec

MIXERS: dict[str, MixerSpec] = {spec.name: spec for spec in (QWEN3_ATTENTION, HYBRID_ATTENTION, LIGHTNING)}
DEFAULT_STUDENT = LIGHTNING.name
"""The student mixer of the published conversions."""


def mixer(name: str) -> MixerSpec:
    """The spec of the mixer `name`: a key of MIXERS, or `module:VARIABLE` for a spec that is imported.

    ValueError if there is no such mixer or it cannot be imported.
    """
    if name not in MIXERS and ":" in name:
        module, _, variable = name.partition(":")
        try:
            spec = getattr(importlib.import_module(module), variable)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"mixer {name} cannot be imported ({error}); put its folder on PYTHONPATH") from None
        if not isinstance(spec, MixerSpec) or spec.name != name:
            raise ValueError(f"{name} is not a MixerSpec with the name {name!r}; correct the import path or the name")
        MIXERS[name] = spec
    if name not in MIXERS:
        near = difflib.get_close_matches(name, MIXERS, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(MIXERS)}, or module:VARIABLE"
        raise ValueError(f"there is no mixer {name!r}; {fix}")
    return MIXERS[name]


def student_mixer(name: str) -> MixerSpec:
    """The mixer `name`, as a replacement of the teacher's attention. ValueError unless it is recurrent."""
    spec = mixer(name)
    if spec.state is None:
        students = ", ".join(name for name, spec in MIXERS.items() if spec.state is not None)
        raise ValueError(f"mixer {name!r} keeps all tokens and cannot be a student; known students are {students}")
    return spec


__all__ = ["DEFAULT_STUDENT", "MIXERS", "MixerSpec", "mixer", "student_mixer"]
