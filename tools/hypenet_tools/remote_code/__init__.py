"""Modelling code for exported folders, where it runs without any package of this project.

An export contains the `*_hypenet.py` files of this folder, a copy of `hypenet_megatron/mixers/modeling.py` as
`mixer_base.py`, one file per mixer with the source that its spec lists, and `mixer_table.py` with their names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.resources import files

from hypenet_megatron.mixers import MixerSpec, modeling
from hypenet_tools.hugging_face.config import mixers_in_use

FIXED_FILES = ("configuration_hypenet.py", "cache_hypenet.py", "modeling_hypenet.py")
_HEADER = '''"""Mixer {name}: {title}, in plain PyTorch."""

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixer_base import HypeNetMixer, HypeNetRMSNorm, rotate


'''
_TABLE = '''"""The mixers of this model by their names in config.json."""

{imports}

MIXERS = {{
{classes}
}}

# Keys of config.json and the only value that this code supports.
SETTINGS = {{
{settings}
}}

# Keys of config.json that repeat another key.
SIZES = {{
{sizes}
}}
'''


def modeling_files(mixer_types: Sequence[str]) -> dict[str, str]:
    """The modelling code of a hybrid with these mixers, as file name to text."""
    used = mixers_in_use(mixer_types)
    fixed = {name: (files(__name__) / name).read_text() for name in FIXED_FILES}
    own = {f"{_module(spec)}.py": _source(spec) for spec in used}
    return {**fixed, **own, "mixer_base.py": inspect.getsource(modeling), "mixer_table.py": _table(used)}


def _module(spec: MixerSpec) -> str:
    return "mixer_" + spec.hf_names[0].replace("-", "_")


def _source(spec: MixerSpec) -> str:
    header = _HEADER.format(name=spec.hf_names[0], title=spec.title)
    return header + "\n\n".join(inspect.getsource(part) for part in spec.modeling)


def _table(specs: Sequence[MixerSpec]) -> str:
    def entries(value: Callable[[MixerSpec], str]) -> str:
        return "\n".join(f"    {spec.hf_names[0]!r}: {value(spec)}," for spec in specs)

    return _TABLE.format(
        imports="\n".join(f"from .{_module(spec)} import {spec.modeling[-1].__name__}" for spec in specs),
        classes=entries(lambda spec: spec.modeling[-1].__name__),
        settings=entries(lambda spec: repr(dict(spec.hf_settings))),
        sizes=entries(lambda spec: repr(dict(spec.hf_sizes))),
    )
