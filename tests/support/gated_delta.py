"""A mixer outside the package, in one file: a gated delta rule without convolution, token by token in plain torch.

    S_t = a_t S_{t-1} + k_t^T b_t (v_t - k_t a_t S_{t-1}),   o_t = q_t S_t / sqrt(D)

Gated Delta Networks, arXiv 2412.06464. docs/add-a-mixer.md explains this file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.layer_specs import Backend, self_attention_spec
from hypenet_megatron.mixers.modeling import HypeNetMixer, rotate
from hypenet_megatron.mixers.spec import Fresh, HuggingFaceTensor, MegatronTensor, MixerSpec, normal
from hypenet_megatron.mixers.spec import self_attention_tensors as projections
from hypenet_megatron.norms import HeadsWeight, weight_in_use


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, rates: Tensor, state: Any = None, real: Any = None
) -> tuple[Tensor, Tensor]:
    """The rule over t more tokens after `state` [b, H, D, D]: query, key (rotated), value [b, H, t, D].

    b_t = sigmoid(write), a_t = exp(-softplus(rates) softplus(forget)), with gates [2, b, H, t] and rates [H].
    `real` [b, t] is False at padding. Returns o like value, and the new fp32 state.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(dtype) * query.shape[-1] ** -0.5, F.normalize(key.to(dtype), dim=-1), value.to(dtype)
    strength = torch.sigmoid(gates[0].to(dtype))
    decay = torch.exp(-F.softplus(rates.to(dtype))[:, None] * F.softplus(gates[1].to(dtype)))
    if real is not None:
        strength, decay = strength.masked_fill(~real[:, None], 0), decay.masked_fill(~real[:, None], 1)
    if state is None:
        state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=dtype, device=q.device)
    outputs = []
    for t in range(q.shape[2]):
        state = decay[:, :, t, None, None] * state
        error = v[:, :, t, None] - k[:, :, t, None] @ state
        state = state + k[:, :, t, :, None] * (strength[:, :, t, None, None] * error)
        outputs.append(q[:, :, t, None] @ state)
    return torch.cat(outputs, dim=2).to(value.dtype), state


class HypeNetGatedDelta(HypeNetMixer):
    """The mixer in an exported model."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        heads = config.num_attention_heads
        super().__init__(config, layer_idx, heads)
        self.o_gate = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        self.write_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.forget_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.rates = nn.Parameter(torch.ones(heads))

    def forward(
        self, x: Tensor, rotary: Any, query_scale: Tensor | None, real: Tensor | None, past_key_values: Any
    ) -> Tensor:
        query, key, value = self.heads(x)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        gates = torch.stack([self.write_proj(x), self.forget_proj(x)]).transpose(2, 3)
        state = None if past_key_values is None else past_key_values.states.get(self.layer_idx)
        new = None if real is None else real[:, -x.shape[1] :]
        output, state = gated_delta_rule(query, key, value, gates, self.rates, state, new)
        if past_key_values is not None:
            past_key_values.states[self.layer_idx] = state
        return self.o_proj(output.transpose(1, 2).flatten(2) * torch.sigmoid(self.o_gate(x)))


class GatedDeltaCore(MegatronModule):
    """What the layer has beside SelfAttention's own weights, divided by heads under tensor parallelism."""

    def __init__(self, config: DecoderConfig, *, pg_collection: ProcessGroupCollection, **_: Any) -> None:
        super().__init__(config)
        heads, tp_group = config.num_attention_heads, pg_collection.tp
        self.linear_gates = ColumnParallelLinear(
            config.hidden_size,
            2 * heads,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=tp_group,
        )
        self.rates = HeadsWeight(config, heads // tp_group.size(), tp_group)

    def forward(self, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        gates, _bias = self.linear_gates(hidden_states)  # per head [write, forget]
        gates = gates.unflatten(-1, (-1, 2)).permute(3, 1, 2, 0)
        return gated_delta_rule(query, key, value, gates, weight_in_use(self.rates))[0]


class GatedDeltaSelfAttention(SelfAttention):
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, rotary_pos_emb: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        mixed, _bias = self.linear_qkv(hidden_states)  # per head [query, gate, key, value]
        mixed = mixed.unflatten(-1, (-1, 4, self.hidden_size_per_attention_head))
        query, gate, key, value = mixed.permute(3, 1, 2, 0, 4)
        angles = rotary_pos_emb[:, 0, 0]
        query, key = (
            rotate(norm(x), angles.cos(), angles.sin())
            for norm, x in ((self.q_layernorm, query), (self.k_layernorm, key))
        )
        output = self.core_attention(hidden_states, query, key, value) * torch.sigmoid(gate)
        return self.linear_proj(output.permute(2, 0, 1, 3).flatten(2))


def _layer(backend: Backend) -> ModuleSpec:
    return self_attention_spec(backend, GatedDeltaSelfAttention, GatedDeltaCore)


def _rates(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.linspace(-6.0, 0.0, size[0])


_GATES = tuple(
    HuggingFaceTensor(f"self_attn.{gate}_proj.weight", "heads hidden", normal(gate)) for gate in ("write", "forget")
)
_RATES = HuggingFaceTensor("self_attn.rates", "heads", Fresh("rates", _rates))

SPEC = MixerSpec(
    name="tests.support.gated_delta:SPEC",
    title="a gated delta rule",
    layer=_layer,
    tensors=(
        *projections(gate="o_gate", clone_heads=True),
        MegatronTensor("self_attention.core_attention.linear_gates.weight", _GATES, "rows", per_group=True),
        MegatronTensor("self_attention.core_attention.rates.weight", (_RATES,), "rows"),
    ),
    rope=True,
    gated=True,
    state="heads head head",
    hf_names=("gated-delta",),
    hf_settings={"gated_delta_use_rope": True},
    hf_sizes={"gated_delta_heads": "num_attention_heads"},
    modeling=(gated_delta_rule, HypeNetGatedDelta),
)
