"""Shapes the conversion tests share."""

from dataclasses import replace

from hypenet_megatron.presets import ModelShape

HYBRID: tuple[str, ...] = ("lightning", "attn", "lightning", "attn")
TINY = ModelShape(
    "tiny", 4, 48, 80, query_heads=4, kv_groups=2, head_dim=16, vocab_size=96, tied_embeddings=True
)


def tiny(shape: ModelShape) -> ModelShape:
    """A published shape with its proportions and switches, in tiny dimensions."""
    return replace(
        shape,
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        query_heads=2 * shape.query_heads // shape.kv_groups,
        kv_groups=2,
        head_dim=8,
        vocab_size=96,
        experts=4 if shape.experts else 0,
        experts_per_token=2 if shape.experts else 0,
        expert_ffn_size=16 if shape.experts else 0,
    )
