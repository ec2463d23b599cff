# mypy: ignore-errors
"""HypeNet in plain PyTorch: a Qwen3-style decoder whose layers differ in their mixer.

Runs on CPU and GPU in fp32 or bf16 and needs only torch and transformers. Padding may be anywhere in a batch,
except that generation needs it on the left. Padded tokens affect neither attention nor recurrent states.

Shapes: b sequences, t new tokens, n tokens seen so far, H query heads, G key/value heads, D head dim, d hidden
size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .cache_hypenet import HypeNetCache
from .configuration_hypenet import HypeNetConfig
from .mixer_base import HypeNetRMSNorm
from .mixer_table import MIXERS


class HypeNetMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rope_angles(positions, head_dim, theta):
    """RoPE's cosine and sine [b or 1, 1, t, D] in fp32 at positions [b or 1, t]. Both halves of D are equal."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * (1.0 / theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class HypeNetDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = MIXERS[config.mixer_types[layer_idx]](config, layer_idx)
        self.mlp = HypeNetMLP(config)
        self.input_layernorm = HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary, query_scale, real, past_key_values):
        x = x + self.self_attn(self.input_layernorm(x), rotary, query_scale, real, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x))


class HypeNetPreTrainedModel(PreTrainedModel):
    config_class = HypeNetConfig
    base_model_prefix = "model"
    _no_split_modules = ["HypeNetDecoderLayer"]  # noqa: RUF012 (transformers' own convention)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # a recurrent state cannot be rolled back


class HypeNetModel(HypeNetPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HypeNetDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """Compute final hidden states of t new tokens, given as ids [b, t] or embeddings [b, t, d].

        `attention_mask` [b, t] or [b, n + t] is 0 at padding. Only its last t columns are read, because the
        cache holds the rest. `position_ids` [b or 1, t] count the real tokens from 0, as the mask does by default.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("HypeNet does not return attention weights; leave output_attentions off")
        if past_key_values is not None and not isinstance(past_key_values, HypeNetCache):
            raise ValueError(f"HypeNet needs a HypeNetCache, not a {type(past_key_values).__name__}")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = HypeNetCache(self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = 0 if past_key_values is None else past_key_values.length
        real = self._real_tokens(x, attention_mask, past_key_values)
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
            if real is not None:
                position_ids = (real.cumsum(dim=1)[:, past:] - 1).clamp(min=0)
        rotary = rope_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        query_scale = self._query_scale(position_ids)

        hidden_states = []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x)
            x = layer(x, rotary, query_scale, real, past_key_values)
        x = self.norm(x)
        if past_key_values is not None:
            past_key_values.advance(x.shape[1], real)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
        )

    def _query_scale(self, positions):
        """log(t + a) / log(a) as [b or 1, 1, t, 1] in fp32; None in training or without a base."""
        base = self.config.logits_scaling_base()
        if base is None or self.training:
            return None
        return (torch.log(positions.float() + base) / math.log(base))[:, None, :, None]

    @staticmethod
    def _real_tokens(x, attention_mask, past_key_values):
        """Mask [b, n + t] of the tokens that are not padding; None if there is no padding."""
        b, t = x.shape[:2]
        before = None if past_key_values is None else past_key_values.real
        if attention_mask is None and before is None:
            return None
        if attention_mask is None:
            new = torch.ones(b, t, dtype=torch.bool, device=x.device)
        elif attention_mask.dim() != 2 or attention_mask.shape[1] < t:
            raise ValueError(
                f"attention_mask must be [batch, tokens], but has shape {list(attention_mask.shape)}"
            )
        else:
            new = attention_mask[:, -t:].to(device=x.device, dtype=torch.bool)
        if before is None and bool(new.all()):
            return None
        if past_key_values is None or past_key_values.length == 0:
            return new
        if before is None:
            before = torch.ones(b, past_key_values.length, dtype=torch.bool, device=x.device)
        return torch.cat((before.to(x.device), new), dim=1)


class HypeNetForCausalLM(HypeNetPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = HypeNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Compute logits [b, t, vocabulary], or of the last `logits_to_keep` positions, and the loss for `labels`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=kwargs.pop("output_attentions", None),
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Provide a HypeNetCache where `generate` would create another cache."""
        if generation_config.cache_implementation is not None:
            raise ValueError("HypeNet keeps a cache of its own; leave cache_implementation unset")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HypeNetCache(self.config)


__all__ = ["HypeNetCache", "HypeNetForCausalLM", "HypeNetModel", "HypeNetPreTrainedModel"]
