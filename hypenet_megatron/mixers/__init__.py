"""RNN mixers, one file each: a `self_attention` of Megatron's TransformerLayer and the core in it.

A mixer takes hidden states [s, b, d] and RoPE angles and returns (output [s, b, d], no bias); its projections are
Megatron's, so that tensor and sequence parallelism and checkpoint keys are those of attention layers.
"""

from hypenet_megatron.mixers.lightning import LightningCore, LightningSelfAttention

__all__ = ["LightningCore", "LightningSelfAttention"]
