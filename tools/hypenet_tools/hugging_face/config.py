"""Reads and writes the config.json of Qwen3 and HypeNet folders.

The HypeNet keys are those of the released models (arXiv 2601.22156). Each mixer's spec has the keys of that mixer.
Reading refuses settings that `hypenet_megatron` does not implement.
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
# The only values that the decoder implements.
DECODER_SETTINGS: dict[str, Any] = {"attention_bias": False, "hidden_act": "silu"}
# As in published Qwen3: every layer has experts, and the weights of the chosen ones are normalised to a sum of 1.
MOE_SETTINGS: dict[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
OPTIONAL_SETTINGS: dict[str, Any] = {"use_sliding_window": False}
# Fields of ModelShape and their keys in config.json.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "query_heads": "num_attention_heads",
    "kv_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_positions": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
FLOATS = ("norm_epsilon", "rope_theta")
EXPERT_SIZES = {
    "experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn_size": "moe_intermediate_size",
}


@dataclass(frozen=True)
class ModelDescription:
    """The content of a config.json. `mixer_types` is None for a Qwen3 teacher. ValueError for an unknown mixer."""

    shape: ModelShape
    mixer_types: tuple[str, ...] | None
    logits_scaling_base: float | None

    def __post_init__(self) -> None:
        for name in self.mixer_types or ():
            mixer(name)  # imports a mixer from outside this package

    @property
    def mixers(self) -> tuple[str, ...]:
        """Mixer names, one per layer, also for a teacher."""
        return self.mixer_types or self.shape.teacher_mixers()

    @property
    def plan(self) -> tuple[TensorPlan, ...]:
        """The mapping between Hugging Face and Megatron tensors of this model."""
        return conversion_plan(self.shape, self.mixers)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ModelDescription:
        mixers = content["mixer_types"]
        return cls(
            ModelShape(**content["shape"]),
            None if mixers is None else tuple(mixers),
            content["logits_scaling_base"],
        )


def qwen3_config(shape: ModelShape, dtype: str) -> dict[str, Any]:
    """config.json of a teacher, dense or with experts. `dtype` is a name in torch, such as "bfloat16"."""
    if not shape.experts:
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": QWEN3, **_decoder_keys(shape, dtype)}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": QWEN3_MOE,
        **_decoder_keys(shape, dtype),
        **{key: getattr(shape, field) for field, key in EXPERT_SIZES.items()},
        **MOE_SETTINGS,
    }


def mixers_in_use(mixer_types: Sequence[str]) -> list[MixerSpec]:
    """The distinct mixers of a hybrid, softmax attention first."""
    return [mixer(name) for name in dict.fromkeys((ATTENTION, *mixer_types))]


def hypenet_config(
    shape: ModelShape, mixer_types: Sequence[str], logits_scaling_base: float | None, dtype: str
) -> dict[str, Any]:
    """config.json of a hybrid, with the keys of the released models."""
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
        **{key: getattr(shape, field) for field, key in SIZES.items()},
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
    try:
        return _description(config, path.absolute().parent.name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _description(config: Mapping[str, Any], name: str) -> ModelDescription:
    model_type = config.get("model_type")
    if model_type not in (QWEN3, QWEN3_MOE, HYPENET):
        raise ValueError(
            f"model_type is {model_type!r}, but only {QWEN3!r}, {QWEN3_MOE!r} and {HYPENET!r} can be read"
        )
    _refuse_quantised(config)
    _refuse_sliding_windows(config)
    optional = {**OPTIONAL_SETTINGS, **DECODER_SETTINGS}
    _require({**optional, **config}, optional)
    if model_type == QWEN3_MOE:
        _require({**config, "mlp_only_layers": config.get("mlp_only_layers") or []}, MOE_SETTINGS)
    shape = _shape(config, name)
    if model_type != HYPENET:
        return ModelDescription(shape, None, None)
    mixers = _mixer_types(config, shape.num_layers)
    for spec in mixers_in_use(mixers):
        _require(config, {**spec.hf_settings, **{key: config[other] for key, other in spec.hf_sizes.items()}})
        _require({**spec.hf_optional, **config}, spec.hf_optional)
    return ModelDescription(shape, mixers, _logits_scaling_base(config))


def _require(config: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    for key, value in supported.items():
        if config.get(key) != value:
            raise ValueError(f"{key} is {config.get(key)!r}, but only {value!r} is supported")


def _refuse_quantised(config: Mapping[str, Any]) -> None:
    quantisation = config.get("quantization_config")
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise ValueError(
            f"quantization_config says that the weights are quantised ({method}), but only float32, bfloat16 and "
            "float16 weights can be read; use those of the unquantised model"
        )


def _refuse_sliding_windows(config: Mapping[str, Any]) -> None:
    kinds = config.get("layer_types") or []
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind != "full_attention":
            raise ValueError(
                f"layer_types holds {kind!r}, but only 'full_attention' is supported; use a Qwen3 without sliding "
                "windows"
            )


def _shape(config: Mapping[str, Any], name: str) -> ModelShape:
    tied = config.get("tie_word_embeddings")
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings is {tied!r} instead of true or false; restore the config")
    keys = dict(SIZES)
    if config["model_type"] == QWEN3_MOE:
        keys |= EXPERT_SIZES
        if "num_experts" not in config:
            keys["experts"] = "num_local_experts"
    holder = {**config, "rope_theta": _rope_theta(config)}
    sizes = {field: _number(holder, key, float if field in FLOATS else int) for field, key in keys.items()}
    return ModelShape(name=name, tied_embeddings=tied, **sizes)


def _number(config: Mapping[str, Any], key: str, kind: type[int] | type[float]) -> Any:
    value = config.get(key)
    if kind is float and isinstance(value, int):
        value = float(value)
    if isinstance(config.get(key), bool) or not isinstance(value, kind) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {value!r} instead of a positive number; restore the config")
    return value


def _rope_theta(config: Mapping[str, Any]) -> Any:
    """RoPE's base. transformers 5 writes it to `rope_parameters`, earlier versions to the top level."""
    base = config.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        if scaling is None:
            continue
        if not isinstance(scaling, dict):
            raise ValueError(f"{key} is {scaling!r} instead of an object; restore the config")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise ValueError(f"RoPE scaling of type {kind!r} is not supported; remove {key}")
        base = scaling.get("rope_theta", base)
    return base


def _mixer_types(config: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    names = config.get("mixer_types")
    if not isinstance(names, list) or len(names) != num_layers:
        raise ValueError(f"mixer_types must list one mixer for each of the {num_layers} layers")
    known = {hf_name: name for name, spec in MIXERS.items() for hf_name in spec.hf_names}
    unknown = sorted({str(name) for name in names if name not in known})
    if unknown:
        raise ValueError(
            f"mixer_types holds {', '.join(unknown)}, but only {', '.join(known)} are supported"
        )
    return tuple(known[name] for name in names)


def _logits_scaling_base(config: Mapping[str, Any]) -> float | None:
    value = config.get("attn_logits_scaling")
    if value is None:
        return None
    try:
        method, base = str(value).split()
        if method == "hype" and 1 < float(base) < math.inf:
            return float(base)
    except ValueError:
        pass
    raise ValueError(
        f'attn_logits_scaling is {value!r}; write null or "hype <a>" with a number a above 1'
    )
