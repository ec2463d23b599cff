"""What mixers share; an export has a copy of that file in this place."""

from hypenet_megatron.mixers.modeling import HypeNetMixer, HypeNetRMSNorm, rotate

__all__ = ["HypeNetMixer", "HypeNetRMSNorm", "rotate"]
