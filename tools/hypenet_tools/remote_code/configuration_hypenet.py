# mypy: ignore-errors
"""Configuration of HypeNet, a Qwen3-style decoder with softmax-attention and recurrent layers."""

from transformers.configuration_utils import PreTrainedConfig

from .mixer_table import MIXERS, SETTINGS, SIZES


class HypeNetConfig(PreTrainedConfig):
    """The keys of config.json.

    `mixer_types` has one key of `mixer_table.MIXERS` per layer. `attn_logits_scaling` is None or "hype <a>":
    at inference, the queries of attention layers at position t are scaled by log(t + a) / log(a). Mixers add
    their own keys (`mixer_table.SETTINGS` and `SIZES`). ValueError for a value that this code does not
    implement.
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
        attn_logits_scaling=None,
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
        self.attn_logits_scaling = attn_logits_scaling
        supported = {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            **{key: value for settings in SETTINGS.values() for key, value in settings.items()},
            **{key: getattr(self, source) for sizes in SIZES.values() for key, source in sizes.items()},
        }
        for key, value in supported.items():
            if not hasattr(self, key):
                setattr(self, key, kwargs.pop(key, value))
        self._refuse_other_architectures(supported, rope_scaling)
        super().__init__(**kwargs)

    def _refuse_other_architectures(self, supported, rope_scaling):
        if len(self.mixer_types) != self.num_hidden_layers or not set(self.mixer_types) <= set(MIXERS):
            raise ValueError(
                f"mixer_types must hold {self.num_hidden_layers} entries out of {', '.join(MIXERS)}"
            )
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
