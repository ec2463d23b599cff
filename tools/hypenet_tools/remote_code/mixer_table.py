"""All registered mixers by their names in config.json; an export has a table of its own mixers in this place."""

from hypenet_megatron.mixers import MIXERS as SPECS

_EXPORTED = {spec.hf_names[0]: spec for spec in SPECS.values() if spec.modeling}
MIXERS = {name: spec.modeling[-1] for name, spec in _EXPORTED.items()}
SETTINGS = {name: spec.hf_settings for name, spec in _EXPORTED.items()}
SIZES = {name: spec.hf_sizes for name, spec in _EXPORTED.items()}
