"""Base classes of the mixers. In an export, this file is a copy of the module imported here."""

from hypenet_megatron.mixers.modeling import HypeNetMixer, HypeNetRMSNorm, rotate

__all__ = ["HypeNetMixer", "HypeNetRMSNorm", "rotate"]
