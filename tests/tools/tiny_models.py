"""Shapes the conversion tests share."""

from hypenet_megatron.presets import MixerType, ModelShape

HYBRID: tuple[MixerType, ...] = ("lightning", "attn", "lightning", "attn")
TINY = ModelShape(
    "tiny", 4, 48, 80, query_heads=4, kv_groups=2, head_dim=16, vocab_size=96, tied_embeddings=True
)
