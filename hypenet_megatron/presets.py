"""Shapes of the Qwen3 teachers, dense and mixture-of-experts, and the three published HypeNet conversions.

Sources: the Qwen3 model cards (config.json of each size) and, for the attention layers and the logits-scaling
base `a`, the configs released with arXiv 2601.22156.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

# Mixer names that every conversion uses: the teacher's attention and the hybrid's attention.
TEACHER, ATTENTION = "qwen3", "attn"

QWEN3_VOCABULARY = 151_936


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Qwen3 decoder. A HypeNet hybrid has the shape of its teacher.

    `head_dim` is independent of `hidden_size / query_heads`; it is 128 in every published Qwen3. `experts` is the
    number of experts in every feed-forward layer, each `expert_ffn_size` wide. 0 experts means a dense model.
    """

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    query_heads: int
    kv_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    rope_theta: float = 1e6
    norm_epsilon: float = 1e-6
    max_positions: int = 40_960
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0

    def __post_init__(self) -> None:
        if self.query_heads % self.kv_groups:
            raise ValueError(
                f"shape {self.name}: query_heads {self.query_heads} is not a multiple of kv_groups {self.kv_groups}"
            )
        if self.head_dim % 2:
            raise ValueError(f"shape {self.name}: head_dim {self.head_dim} must be even for RoPE")
        if self.experts and not (0 < self.experts_per_token <= self.experts and self.expert_ffn_size > 0):
            raise ValueError(
                f"shape {self.name}: cannot use {self.experts_per_token} of {self.experts} experts of width "
                f"{self.expert_ffn_size}; correct experts, experts_per_token and expert_ffn_size"
            )

    def teacher_mixers(self) -> tuple[str, ...]:
        """The teacher's mixer names, one per layer."""
        return (TEACHER,) * self.num_layers

    def hybrid_mixers(self, attention_layers: Collection[int], student: str) -> tuple[str, ...]:
        """The hybrid's mixer names: softmax attention at the given 0-based layers, `student` elsewhere."""
        outside = [layer for layer in attention_layers if not 0 <= layer < self.num_layers]
        if outside:
            raise ValueError(
                f"attention layers {outside} do not exist in {self.name} with {self.num_layers} layers"
            )
        return tuple(ATTENTION if layer in attention_layers else student for layer in range(self.num_layers))


def _qwen3(
    size: str, layers: int, hidden: int, ffn: int, query_heads: int, *, tied: bool, kv_groups: int = 8
) -> ModelShape:
    return ModelShape(
        name=f"qwen3-{size}",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        query_heads=query_heads,
        kv_groups=kv_groups,
        head_dim=128,
        vocab_size=QWEN3_VOCABULARY,
        tied_embeddings=tied,
    )


def _with_experts(dense: ModelShape, expert_ffn: int) -> ModelShape:
    return replace(dense, experts=128, experts_per_token=8, expert_ffn_size=expert_ffn)


QWEN3_SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _qwen3("0.6b", 28, 1024, 3072, 16, tied=True),
        _qwen3("1.7b", 28, 2048, 6144, 16, tied=True),
        _qwen3("4b", 36, 2560, 9728, 32, tied=True),
        _qwen3("8b", 36, 4096, 12_288, 32, tied=False),
        _qwen3("14b", 40, 5120, 17_408, 40, tied=False),
        _qwen3("32b", 64, 5120, 25_600, 64, tied=False),
        _with_experts(_qwen3("30b-a3b", 48, 2048, 6144, 32, tied=False, kv_groups=4), 768),
        _with_experts(_qwen3("235b-a22b", 94, 4096, 12_288, 64, tied=False, kv_groups=4), 1536),
    )
}


@dataclass(frozen=True)
class HypeNetPreset:
    """A published conversion: its attention layers, and the base `a` of s_t = log(t + a) / log(a)."""

    name: str
    shape: ModelShape
    attention_layers: tuple[int, ...]
    logits_scaling_base: float


HYPENET_PRESETS: dict[str, HypeNetPreset] = {
    preset.name: preset
    for preset in (
        HypeNetPreset("hypenet-2b", QWEN3_SHAPES["qwen3-1.7b"], (2, 3, 6, 8, 9, 21, 25), 500.0),
        # The paper's formula on the published scores selects layer 34 instead of 31. We follow the released config.
        HypeNetPreset("hypenet-5b", QWEN3_SHAPES["qwen3-4b"], (0, 1, 7, 14, 15, 22, 24, 31, 33), 600.0),
        HypeNetPreset("hypenet-9b", QWEN3_SHAPES["qwen3-8b"], (1, 2, 4, 6, 7, 10, 24, 33, 34), 900.0),
    )
}
