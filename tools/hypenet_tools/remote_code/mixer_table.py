"""All registered mixers by their names in config.json. An export replaces this file by a table of its own mixers."""

from hypenet_megatron.mixers import MIXERS as SPECS

_EXPORTED = {spec.hf_names[0]: spec for spec in SPECS.values() if spec.modeling}
MIXERS = {name: spec.modeling[-1] for name, spec in _EXPORTED.items()}
SETTINGS = {name: spec.hf_settings for name, spec in _EXPORTED.items()}
SIZES = {name: spec.hf_sizes for name, spec in _EXPORTED.items()}
