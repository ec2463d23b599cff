"""RNN mixers: one file each, all usable as the `core_attention` of Megatron's SelfAttention.

A mixer takes query, key, value [s, b, heads / tp, head_dim] (after q/k norm and RoPE) and returns
[s, b, heads * head_dim / tp] with its own output norm applied; the output gate and the projection around it are
Megatron's.
"""

from hypenet_megatron.mixers.lightning import LightningCore

__all__ = ["LightningCore"]
