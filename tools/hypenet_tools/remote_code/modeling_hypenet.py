# mypy: ignore-errors
"""HypeNet in plain PyTorch: attention layers without positions, Lightning Attention layers with RoPE.

Runs on CPU and GPU in fp32 or bf16 and needs only torch and transformers. Padding may stand anywhere in a
batch (generation wants it on the left): padded tokens enter neither the attention nor the recurrent state.

Shapes in comments: b sequences, t new tokens, n tokens seen so far, H query heads, G key/value heads, D
head dim.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .cache_hypenet import HypeNetCache
from .configuration_hypenet import HypeNetConfig

LIGHTNING_CHUNK = 256  # tokens per block of the chunked recurrence
ATTENTION_BLOCK = 1024  # queries per block where an explicit mask is needed, so that no [t, n] mask exists


class HypeNetRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class HypeNetMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rope_angles(positions, head_dim, theta):
    """Cosine and sine [b or 1, 1, t, D] of RoPE at positions [b or 1, t], fp32, the half repeated."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * (1.0 / theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate pairs (i, i + D/2) of x [b, H, t, D]; computed in fp32, returned in the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def causal_attention(query, key, value, real):
    """Softmax attention of the last t of n tokens: query [b, H, t, D], key and value [b, G, n, D].

    Returns [b, H, t, D]. `real` [b, n] hides padding; a padded query sees itself, since a row of the softmax
    without any key would be NaN.
    """
    t, n = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if real is None and t in (1, n):
        return F.scaled_dot_product_attention(query, key, value, is_causal=t > 1, enable_gqa=grouped)
    if grouped and t > 1:
        # Masked attention over grouped heads has no memory-efficient kernel; over repeated heads it has.
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        grouped = False
    blocks = []
    for start in range(0, t, ATTENTION_BLOCK):
        block = query[:, :, start : start + ATTENTION_BLOCK]
        end = n - t + start + block.shape[2]
        own = torch.arange(end - block.shape[2], end, device=query.device)[:, None]
        other = torch.arange(end, device=query.device)
        visible = (other <= own)[None]
        if real is not None:
            visible = visible & (real[:, None, :end] | (other == own))
        blocks.append(
            F.scaled_dot_product_attention(
                block, key[:, :, :end], value[:, :, :end], attn_mask=visible[:, None], enable_gqa=grouped
            )
        )
    return torch.cat(blocks, dim=2)


def decay_slopes(heads):
    """-log of the decay per token of each head: 2^(-8h/H) for h = 1..H.

    Where H is no power of two: those of the largest power of two below, then every second one of twice as
    many heads.
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    if power < heads:
        slopes += decay_slopes(2 * power)[0::2][: heads - power]
    return slopes


@lru_cache(maxsize=64)
def slopes_on(heads, device, dtype):
    return torch.tensor(decay_slopes(heads), device=device, dtype=dtype)


def lightning_attention(query, key, value, state, real):
    """Decayed linear attention of t more tokens after `state` [b, H, D, D] (None: nothing before), in chunks.

    S_i = gamma S_{i-1} + k_i^T v_i and o_i = q_i S_i / sqrt(D) over the tokens that `real` [b, t] marks;
    padded ones neither add to the state nor age it. query, key, value [b, H, t, D]; returns o like value,
    and the new fp32 state.
    """
    b, heads, t, head_dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    slopes = slopes_on(heads, query.device, dtype)[:, None, None]
    if state is None:
        state = torch.zeros(b, heads, head_dim, head_dim, device=query.device, dtype=dtype)
    if real is not None:
        key, value = (x.masked_fill(~real[:, None, :, None], 0) for x in (key, value))
    outputs = []
    for start in range(0, t, LIGHTNING_CHUNK):
        q, k, v = (x[:, :, start : start + LIGHTNING_CHUNK].to(dtype) for x in (query, key, value))
        if real is None:
            age = torch.arange(1, q.shape[2] + 1, device=query.device)[None, None, :, None]
        else:
            age = real[:, None, start : start + LIGHTNING_CHUNK, None].cumsum(dim=2)
        age = age.to(dtype)  # [b or 1, 1, c, 1]: real tokens of this chunk up to and including this one
        distance = (age - age.transpose(2, 3)).clamp(min=0)
        decay = torch.exp(-slopes * distance).tril()
        q = q * head_dim**-0.5
        output = (q @ k.transpose(2, 3) * decay) @ v + (q @ state) * torch.exp(-slopes * age)
        outputs.append(output.to(value.dtype))
        last = age[:, :, -1:]
        state = (
            torch.exp(-slopes * last) * state + (k * torch.exp(-slopes * (last - age))).transpose(2, 3) @ v
        )
    return torch.cat(outputs, dim=2), state


class HypeNetMixer(nn.Module):
    """Projections and q/k norms that both kinds of mixers share."""

    def __init__(self, config, layer_idx, kv_heads):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = HypeNetRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = HypeNetRMSNorm(config.head_dim, config.rms_norm_eps)

    def heads(self, x):
        """Queries [b, H, t, D], keys and values [b, G, t, D] of hidden states [b, t, d]."""
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2), value.transpose(1, 2)


class HypeNetAttention(HypeNetMixer):
    """Softmax attention without positions; `query_scale` [b or 1, 1, t, 1] sharpens it in long contexts."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx, config.num_key_value_heads)
        self.o_gate = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)

    def forward(self, x, rotary, query_scale, real, past_key_values):
        query, key, value = self.heads(x)
        if query_scale is not None:
            query = (query * query_scale).to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output = causal_attention(query, key, value, real)
        return self.o_proj(output.transpose(1, 2).flatten(2) * torch.sigmoid(self.o_gate(x)))


class HypeNetLightningAttention(HypeNetMixer):
    """Linear attention with a fixed decay per head, RoPE, and one output norm over all heads."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx, config.num_attention_heads)
        width = config.num_attention_heads * config.head_dim
        self.z_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_norm = HypeNetRMSNorm(width, config.rms_norm_eps)

    def forward(self, x, rotary, query_scale, real, past_key_values):
        query, key, value = self.heads(x)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        state = None if past_key_values is None else past_key_values.states.get(self.layer_idx)
        new = None if real is None else real[:, -x.shape[1] :]
        with torch.autocast(device_type=x.device.type, enabled=False):
            output, state = lightning_attention(query, key, value, state, new)
        if past_key_values is not None:
            past_key_values.states[self.layer_idx] = state
        return self.o_proj(self.o_norm(output.transpose(1, 2).flatten(2)) * torch.sigmoid(self.z_proj(x)))


class HypeNetDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        mixer = HypeNetAttention if config.mixer_types[layer_idx] == "attn" else HypeNetLightningAttention
        self.self_attn = mixer(config, layer_idx)
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
    _is_stateful = True  # a recurrent state cannot take tokens back


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
        """Final hidden states of t new tokens, given as ids [b, t] or embeddings [b, t, d].

        `attention_mask` [b, t] or [b, n + t] is 0 at padding; only its last t columns are read, the cache
        remembers the rest. `position_ids` [b or 1, t] count the real tokens from 0 and are worked out when
        not given.
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
        """s = log(t + a) / log(a) as [b or 1, 1, t, 1], fp32; None in training or when switched off."""
        base = self.config.logits_scaling_base()
        if base is None or self.training:
            return None
        return (torch.log(positions.float() + base) / math.log(base))[:, None, :, None]

    @staticmethod
    def _real_tokens(x, attention_mask, past_key_values):
        """Which of all tokens so far are not padding, [b, n + t] bool; None when all are real."""
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
        """Logits [b, t, vocabulary] or of the last `logits_to_keep` positions, and the loss for `labels`."""
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
        """Called by `generate`: give it our cache where transformers would make a cache of its own."""
        if generation_config.cache_implementation is not None:
            raise ValueError("HypeNet keeps a cache of its own; leave cache_implementation unset")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HypeNetCache(self.config)


__all__ = ["HypeNetCache", "HypeNetForCausalLM", "HypeNetModel", "HypeNetPreTrainedModel"]
