"""An RNN layer of HypeNet in two forms: as in the code of the paper, and with our kernels.

The first form is that of a Hugging Face model: separate projections, norms and rotation in PyTorch with casts to fp32
and back, and flash-linear-attention on fp32 tensors. Weights are the same, results equal up to bf16 rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fla.ops.simple_gla import chunk_simple_gla
from torch import Tensor, nn

from hypenet_kernels import decay_slopes, gated_norm, lightning_attention, norm_rope

EPSILON = 1e-6


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return weight * wide.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Layer(nn.Module):
    """x [b, s, d] -> [b, s, d]: projections q, k, v, z and o, q/k norms, output norm and gate."""

    def __init__(self, heads: int, head_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        width = heads * head_dim
        self.qkvz = nn.Parameter(torch.randn(4, width, hidden_size) * 0.02)
        self.out = nn.Parameter(torch.randn(hidden_size, width) * 0.02)
        self.q_norm, self.k_norm = (nn.Parameter(torch.rand(head_dim) + 0.5) for _ in range(2))
        self.o_norm = nn.Parameter(torch.rand(width) + 0.5)
        self.slopes = decay_slopes(heads)

    def _angles(self, length: int) -> Tensor:
        inverse = 1e6 ** (-torch.arange(0, self.head_dim, 2, device="cuda").float() / self.head_dim)
        return torch.arange(length, device="cuda").float()[:, None] * inverse

    def reference(self, x: Tensor) -> Tensor:
        angles = self._angles(x.shape[1])
        cos, sin = (torch.cat([f(angles)] * 2, -1)[None, :, None].to(x.dtype) for f in (torch.cos, torch.sin))
        q, k, v, z = (F.linear(x, weight) for weight in self.qkvz)
        q, k, v = (y.unflatten(-1, (self.heads, self.head_dim)) for y in (q, k, v))
        q, k = (_rotate(_rms_norm(y, w), cos, sin) for y, w in ((q, self.q_norm), (k, self.k_norm)))
        exponents = -torch.tensor(self.slopes, device="cuda")
        o, _ = chunk_simple_gla(q.float(), k.float(), v.float(), scale=self.head_dim**-0.5, g_gamma=exponents)
        o = _rms_norm(o.to(x.dtype).flatten(-2), self.o_norm)
        return F.linear(o * torch.sigmoid(z), self.out)

    def ours(self, x: Tensor) -> Tensor:
        angles = self._angles(x.shape[1])
        mixed = F.linear(x, self.fused).unflatten(-1, (self.heads, 4, self.head_dim))
        q, k, v, z = mixed.unbind(-2)
        q, k = norm_rope(q, k, self.q_norm, self.k_norm, angles.cos(), angles.sin(), EPSILON)
        o, _ = lightning_attention(q, k, v, self.slopes, self.head_dim**-0.5)
        return F.linear(gated_norm(o, z, self.o_norm, EPSILON), self.out)

    def fuse(self) -> None:
        """Fuse the four projections: query, key, value, gate per head, as one parameter like in our model."""
        blocks = self.qkvz.detach().unflatten(1, (self.heads, self.head_dim)).transpose(0, 1)
        self.fused = nn.Parameter(blocks.flatten(0, 2).contiguous())


def compare(
    heads: int, head_dim: int, *, length: int, median_ms: Callable[[Callable[[], Any]], float]
) -> dict[str, Any]:
    """Check that both forms agree. Time both, and the projections only, forward and forward + backward."""
    hidden_size = heads * head_dim
    layer = Layer(heads, head_dim, hidden_size).cuda().bfloat16()
    layer.fuse()
    x, dy = (torch.randn(1, length, hidden_size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()

    def projections(x: Tensor) -> Tensor:
        return F.linear(F.linear(x, layer.fused)[..., :hidden_size], layer.out)

    results: dict[str, Any] = {}
    found = {}
    for name in ("reference", "ours", "projections"):
        function = projections if name == "projections" else getattr(layer, name)
        weights = {
            "reference": [layer.qkvz, layer.out, layer.q_norm, layer.k_norm, layer.o_norm],
            "ours": [layer.fused, layer.out, layer.q_norm, layer.k_norm, layer.o_norm],
            "projections": [layer.fused, layer.out],
        }[name]

        def both(function: Any = function, weights: Any = weights) -> Any:
            return torch.autograd.grad(function(x), [x, *weights], dy)

        def forward(function: Any = function) -> Any:
            with torch.no_grad():
                return function(x)

        if name != "projections":
            found[name] = [forward(), both()[0]]
        results[f"{name} forward"] = median_ms(forward)
        results[f"{name} forward+backward"] = median_ms(both)
    results["difference"] = [
        float((a - b).float().norm() / b.float().norm())
        for a, b in zip(found["ours"], found["reference"], strict=True)
    ]
    assert max(results["difference"]) <= 2e-2, results["difference"]  # both round to bf16 several times
    return results
