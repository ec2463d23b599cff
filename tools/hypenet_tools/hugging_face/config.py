"""config.json of Qwen3 and HypeNet folders: which keys we write, and how we read them back.

The HypeNet keys are those of the released models (arXiv 2601.22156). The keys of a mixer are in its spec. Settings that
the layout allows but our model does not implement are refused when read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from durable_files import read_json
from hypenet_megatron.mixers import MIXERS, MixerSpec, mixer
from hypenet_megatron.presets import ATTENTION, ModelShape
from hypenet_tools.hugging_face.mapping import TensorPlan, conversion_plan

QWEN3, QWEN3_MOE, HYPENET = "qwen3", "qwen3_moe", "hypenet"
# What the code behind a model type does; any other value would be another model.
DECODER_SETTINGS: dict[str, Any] = {"attention_bias": False, "hidden_act": "silu"}
# Every layer has experts, and the weights of the chosen ones are made to add up to one, as in published Qwen3.
MOE_SETTINGS: dict[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
OPTIONAL_SETTINGS: dict[str, Any] = {"use_sliding_window": False}


@dataclass(frozen=True)
class ModelDescription:
    """What a config.json says. `mixer_types` is None for a Qwen3 teacher. ValueError for an unknown mixer."""

    shape: ModelShape
    mixer_types: tuple[str, ...] | None
    logits_scaling_base: float | None

    def __post_init__(self) -> None:
        for name in self.mixer_types or ():
            mixer(name)  # imports a mixer from outside this package

    @property
    def mixers(self) -> tuple[str, ...]:
        """Names of the mixers, a teacher's too, one per layer."""
        return self.mixer_types or self.shape.teacher_mixers()

    @property
    def plan(self) -> tuple[TensorPlan, ...]:
        """The mapping table filled in for this model."""
        return conversion_plan(self.shape, self.mixers)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": asdict(self.shape)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ModelDescription:
        mixers = content["mixer_types"]
        return cls(
            ModelShape(**content["shape"]),
            None if mixers is None else tuple(mixers),
            content["logits_scaling_base"],
        )


def qwen3_config(shape: ModelShape, dtype: str) -> dict[str, Any]:
    """config.json of a teacher, dense or with experts. `dtype` as torch spells it: "bfloat16"."""
    if not shape.experts:
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": QWEN3, **_decoder_keys(shape, dtype)}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": QWEN3_MOE,
        **_decoder_keys(shape, dtype),
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_ffn_size,
        **MOE_SETTINGS,
    }


def mixers_in_use(mixer_types: Sequence[str]) -> list[MixerSpec]:
    """The mixers of a hybrid, each once, softmax attention first."""
    return [mixer(name) for name in dict.fromkeys((ATTENTION, *mixer_types))]


def hypenet_config(
    shape: ModelShape, mixer_types: Sequence[str], logits_scaling_base: float | None, dtype: str
) -> dict[str, Any]:
    """config.json of a hybrid in the released layout."""
    decoder, used = _decoder_keys(shape, dtype), mixers_in_use(mixer_types)
    return {
        "architectures": ["HypeNetForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_hypenet.HypeNetConfig",
            "AutoModel": "modeling_hypenet.HypeNetModel",
            "AutoModelForCausalLM": "modeling_hypenet.HypeNetForCausalLM",
        },
        "model_type": HYPENET,
        **decoder,
        "mixer_types": [mixer(name).hf_names[0] for name in mixer_types],
        **{key: value for spec in used for key, value in spec.hf_settings.items()},
        **{key: decoder[other] for spec in used for key, other in spec.hf_sizes.items()},
        "attn_logits_scaling": None if logits_scaling_base is None else f"hype {logits_scaling_base:.17g}",
    }


def _decoder_keys(shape: ModelShape, dtype: str) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_groups,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied_embeddings,
        **DECODER_SETTINGS,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
    }


def read_config(path: Path) -> ModelDescription:
    """Parse a config.json. ValueError names the file, the key and the fix."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object; restore the config.json of the model")
    model_type = config.get("model_type")
    if model_type not in (QWEN3, QWEN3_MOE, HYPENET):
        raise ValueError(
            f"{path}: model_type is {model_type!r}, but only {QWEN3!r}, {QWEN3_MOE!r} and {HYPENET!r} can be read"
        )
    reader = _Reader(path, config)
    reader.refuse_quantised()
    reader.refuse_sliding_windows()
    reader.require_optional_settings({**OPTIONAL_SETTINGS, **DECODER_SETTINGS})
    if model_type == QWEN3_MOE:
        reader.require_settings(
            config | {"mlp_only_layers": config.get("mlp_only_layers") or []}, MOE_SETTINGS
        )
    shape = reader.shape()
    if model_type != HYPENET:
        return ModelDescription(shape, None, None)
    mixers = reader.mixer_types(shape.num_layers)
    for spec in mixers_in_use(mixers):
        reader.require_settings(config, {**spec.hf_settings, **{k: config[v] for k, v in spec.hf_sizes.items()}})
        reader.require_optional_settings(spec.hf_optional)
    return ModelDescription(shape, mixers, reader.logits_scaling_base())


@dataclass(frozen=True)
class _Reader:
    path: Path
    config: dict[str, Any]

    def require_optional_settings(self, supported: Mapping[str, Any]) -> None:
        self.require_settings({key: self.config.get(key, value) for key, value in supported.items()}, supported)

    def require_settings(self, found: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
        for key, value in supported.items():
            if found.get(key) != value:
                raise ValueError(f"{self.path}: {key} is {found.get(key)!r}, but only {value!r} is supported")

    def refuse_quantised(self) -> None:
        quantisation = self.config.get("quantization_config")
        if quantisation is not None:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
            raise ValueError(
                f"{self.path}: quantization_config says that the weights are quantised ({method}); only float32, "
                "bfloat16 and float16 weights can be read, use those of the unquantised model"
            )

    def refuse_sliding_windows(self) -> None:
        kinds = self.config.get("layer_types") or []
        for kind in kinds if isinstance(kinds, list) else [kinds]:
            if kind != "full_attention":
                raise ValueError(
                    f"{self.path}: layer_types holds {kind!r}, but only 'full_attention' is supported; use a Qwen3 "
                    "without sliding windows"
                )

    def expert_sizes(self) -> dict[str, int]:
        if self.config.get("model_type") != QWEN3_MOE:
            return {}
        experts = "num_experts" if "num_experts" in self.config else "num_local_experts"
        return {
            "experts": self.number(experts, int),
            "experts_per_token": self.number("num_experts_per_tok", int),
            "expert_ffn_size": self.number("moe_intermediate_size", int),
        }

    def number(self, key: str, kind: type[int] | type[float]) -> Any:
        value = self.config.get(key)
        if kind is float and isinstance(value, int):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
            raise ValueError(
                f"{self.path}: {key} is {value!r} instead of a positive number; restore the config"
            )
        return value

    def shape(self) -> ModelShape:
        tied = self.config.get("tie_word_embeddings")
        if not isinstance(tied, bool):
            raise ValueError(
                f"{self.path}: tie_word_embeddings is {tied!r} instead of true or false; restore the config"
            )
        try:
            return ModelShape(
                name=self.path.absolute().parent.name,
                num_layers=self.number("num_hidden_layers", int),
                hidden_size=self.number("hidden_size", int),
                ffn_hidden_size=self.number("intermediate_size", int),
                query_heads=self.number("num_attention_heads", int),
                kv_groups=self.number("num_key_value_heads", int),
                head_dim=self.number("head_dim", int),
                vocab_size=self.number("vocab_size", int),
                tied_embeddings=tied,
                rope_theta=self.rope_theta(),
                norm_epsilon=self.number("rms_norm_eps", float),
                max_positions=self.number("max_position_embeddings", int),
                **self.expert_sizes(),
            )
        except ValueError as error:
            message = str(error)
            raise ValueError(message if str(self.path) in message else f"{self.path}: {message}") from None

    def rope_theta(self) -> float:
        """RoPE's base; transformers 5 keeps it in `rope_parameters`, earlier ones beside the other keys."""
        holder = self
        for key in ("rope_scaling", "rope_parameters"):
            scaling = self.config.get(key)
            if scaling is None:
                continue
            if not isinstance(scaling, dict):
                raise ValueError(
                    f"{self.path}: {key} is {scaling!r} instead of an object; restore the config"
                )
            kind = scaling.get("rope_type", scaling.get("type", "default"))
            if kind != "default":
                raise ValueError(f"{self.path}: RoPE scaling of type {kind!r} is not supported; remove {key}")
            if "rope_theta" in scaling:
                holder = _Reader(self.path, scaling)
        return holder.number("rope_theta", float)

    def mixer_types(self, num_layers: int) -> tuple[str, ...]:
        names = self.config.get("mixer_types")
        if not isinstance(names, list) or len(names) != num_layers:
            raise ValueError(
                f"{self.path}: mixer_types must list one mixer for each of the {num_layers} layers"
            )
        known = {hf_name: name for name, spec in MIXERS.items() for hf_name in spec.hf_names}
        unknown = sorted({str(name) for name in names if name not in known})
        if unknown:
            raise ValueError(
                f"{self.path}: mixer_types holds {', '.join(unknown)}, but only {', '.join(known)} are supported"
            )
        return tuple(known[name] for name in names)

    def logits_scaling_base(self) -> float | None:
        value = self.config.get("attn_logits_scaling")
        if value is None:
            return None
        try:
            method, base = str(value).split()
            if method == "hype" and 1 < float(base) < math.inf:
                return float(base)
        except ValueError:
            pass
        raise ValueError(
            f'{self.path}: attn_logits_scaling is {value!r}; write null or "hype <a>" with a number a above 1'
        )
