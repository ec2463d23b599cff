# mypy: ignore-errors
"""Configuration of HypeNet, a Qwen3-style decoder with softmax-attention and Lightning Attention layers."""

from transformers.configuration_utils import PreTrainedConfig

MIXER_TYPES = ("attn", "lightning-attn")


class HypeNetConfig(PreTrainedConfig):
    """Keys of config.json.

    `mixer_types` has one entry per layer, "attn" or "lightning-attn". `attn_logits_scaling` is None or
    "hype <a>": at inference, queries of attention layers at position t are scaled by log(t + a) / log(a).
    The other `attn_*` and `lightning_*` keys describe the released architecture; values it does not have
    are refused.
    """

    model_type = "hypenet"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own convention)

    def __init__(
        self,
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        mixer_types=None,
        hidden_act="silu",
        max_position_embeddings=40960,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        use_cache=True,
        tie_word_embeddings=True,
        rope_theta=1000000.0,
        rope_scaling=None,
        attention_bias=False,
        attention_dropout=0.0,
        attn_use_rope=False,
        attn_use_output_gate=True,
        attn_logits_scaling=None,
        lightning_use_rope=True,
        lightning_use_qk_norm=True,
        lightning_use_output_norm=True,
        lightning_use_output_gate=True,
        lightning_nh=None,
        lightning_nkv=None,
        lightning_head_dim=None,
        lightning_scale="1/sqrt(d)",
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.mixer_types = ["attn"] * num_hidden_layers if mixer_types is None else list(mixer_types)
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.rope_theta = rope_theta
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.attn_use_rope = attn_use_rope
        self.attn_use_output_gate = attn_use_output_gate
        self.attn_logits_scaling = attn_logits_scaling
        self.lightning_use_rope = lightning_use_rope
        self.lightning_use_qk_norm = lightning_use_qk_norm
        self.lightning_use_output_norm = lightning_use_output_norm
        self.lightning_use_output_gate = lightning_use_output_gate
        self.lightning_nh = num_attention_heads if lightning_nh is None else lightning_nh
        self.lightning_nkv = num_attention_heads if lightning_nkv is None else lightning_nkv
        self.lightning_head_dim = head_dim if lightning_head_dim is None else lightning_head_dim
        self.lightning_scale = lightning_scale
        self._refuse_other_architectures(rope_scaling)
        super().__init__(**kwargs)

    def _refuse_other_architectures(self, rope_scaling):
        if len(self.mixer_types) != self.num_hidden_layers or not set(self.mixer_types) <= set(MIXER_TYPES):
            raise ValueError(f"mixer_types must hold {self.num_hidden_layers} entries out of {MIXER_TYPES}")
        supported = {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "attn_use_rope": False,
            "attn_use_output_gate": True,
            "lightning_use_rope": True,
            "lightning_use_qk_norm": True,
            "lightning_use_output_norm": True,
            "lightning_use_output_gate": True,
            "lightning_nh": self.num_attention_heads,
            "lightning_nkv": self.num_attention_heads,
            "lightning_head_dim": self.head_dim,
            "lightning_scale": "1/sqrt(d)",
        }
        for key, value in supported.items():
            if getattr(self, key) != value:
                raise ValueError(f"{key} is {getattr(self, key)!r}, but this code supports only {value!r}")
        if rope_scaling is not None:
            raise ValueError(
                "rope_scaling is not supported; HypeNet extends its context by attn_logits_scaling"
            )
        self.logits_scaling_base()

    def logits_scaling_base(self):
        """`a` of "hype <a>", or None when logits scaling is off."""
        if self.attn_logits_scaling is None:
            return None
        words = str(self.attn_logits_scaling).split()
        try:
            base = float(words[1]) if len(words) == 2 and words[0] == "hype" else 0.0
        except ValueError:
            base = 0.0
        if not 1.0 < base < float("inf"):
            raise ValueError(
                f'attn_logits_scaling is {self.attn_logits_scaling!r} instead of null or "hype <a>", a > 1'
            )
        return base


__all__ = ["HypeNetConfig"]
