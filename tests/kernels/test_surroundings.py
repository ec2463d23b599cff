"""The fused norms around Lightning Attention, in Triton's interpreter, against the references in fp64."""

import importlib
import importlib.util
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hypenet_kernels.output_norm import (
    fused_gated_norm,
    fused_heads_sum_of_squares,
    gated_norm,
    heads_sum_of_squares,
    plain_gated_norm,
    plain_heads_sum_of_squares,
)
from hypenet_kernels.query_key_norm import fused_norm_rope, norm_rope, plain_norm_rope

EPSILON = 1e-5
ops = torch.ops.hypenet
# The operators run Triton kernels on any device. CPU tensors need the interpreter.
kernels = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton and TRITON_INTERPRET=1",
)


# With and without torch's dispatcher.
both_ways = pytest.mark.parametrize(
    "ops",
    [
        ops,
        SimpleNamespace(
            norm_rope=fused_norm_rope,
            gated_norm=fused_gated_norm,
            heads_sum_of_squares=fused_heads_sum_of_squares,
        ),
    ],
    ids=["operators", "functions"],
)


@pytest.fixture
def poisoned(monkeypatch):
    """Fill torch.empty with NaN, to detect elements that a kernel does not write."""
    monkeypatch.setattr(torch, "empty", partial(_nan_filled, torch.empty))


def _nan_filled(empty, *args, **kwargs):
    x = empty(*args, **kwargs)
    return x.fill_(float("nan")) if x.is_floating_point() else x


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _angles(time: int, head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 1e4 ** -(torch.arange(head_dim // 2) / (head_dim // 2))
    angles = torch.arange(time)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _fused(batch: int, time: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value, gate: views of one projection [time, batch, heads, 4 head_dim]."""
    projection = _normal(time, batch, heads, 4 * head_dim, seed=time)
    query, key, value, gate = projection.transpose(0, 1).split(head_dim, -1)
    return query, key, value, gate


def _assert_agree(op, plain, inputs, constants=()):
    """Values and gradients of op in fp32 within 1e-6 (relative L2) of plain in fp64."""
    results = []
    for function, dtype in ((op, None), (plain, torch.float64)):
        # detach() keeps the strides of a view, so the kernel sees them
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves, *constants, EPSILON)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all(y.is_contiguous() for y in outputs)
        loss = sum((y * _normal(*y.shape, seed=i)).sum() for i, y in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for ours, expected in zip(*results, strict=True):
        assert ours.shape == expected.shape
        assert (ours.double() - expected).norm() <= 1e-6 * expected.norm()


@kernels
@both_ways
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize(
    ("time", "query_heads", "key_heads", "head_dim"),
    [(1, 3, 3, 64), (5, 3, 1, 128), (5, 16, 8, 64), (9, 2, 2, 128)],
)
def test_norm_rope(poisoned, ops, monkeypatch, time, query_heads, key_heads, head_dim, rope):
    # Four programs: in the backward pass each loops over several tiles.
    module = importlib.import_module(
        "hypenet_kernels.query_key_norm"
    )  # the package's attribute is the function
    monkeypatch.setattr(module, "PROGRAMS_PER_MULTIPROCESSOR", 1)
    query = _fused(2, time, query_heads, head_dim)[0]
    key = _fused(2, time, key_heads, head_dim)[1]
    constants = _angles(time, head_dim) if rope else (None, None)
    inputs = query, key, _normal(head_dim, seed=1), _normal(head_dim, seed=2)
    assert not query.is_contiguous()
    _assert_agree(ops.norm_rope, plain_norm_rope, inputs, constants)


def _plain_on_one_rank(o, gate, weight, epsilon):
    return plain_gated_norm(o, gate, weight, None, weight.shape[0], epsilon)


@kernels
@both_ways
@pytest.mark.parametrize(("time", "heads", "head_dim"), [(1, 3, 64), (5, 3, 128), (9, 8, 64)])
def test_gated_norm(poisoned, ops, time, heads, head_dim):
    gate = _fused(2, time, heads, head_dim)[3]
    inputs = 30 * _normal(2, time, heads, head_dim, seed=1), gate, _normal(heads * head_dim, seed=2)

    def op(o, gate, weight, epsilon):
        return ops.gated_norm(o, gate, weight, None, heads * head_dim, epsilon)

    _assert_agree(op, _plain_on_one_rank, inputs)


@kernels
@both_ways
def test_gated_norm_with_sum(poisoned, ops):
    """The sum is an input of its own, with a gradient; channels are those of all ranks."""
    gate = _fused(2, 5, 3, 64)[3]
    o, sum_squares = _normal(2, 5, 3, 64, seed=1), 400 + _normal(2, 5, seed=3)
    inputs = o, gate, _normal(192, seed=2), sum_squares
    _assert_agree(ops.gated_norm, plain_gated_norm, inputs, (384,))
    _assert_agree(lambda o, _: ops.heads_sum_of_squares(o), lambda o, _: plain_heads_sum_of_squares(o), [o])


def _split(sum_of_squares, with_sum, o, gate, weight, epsilon):
    """Compute on two ranks with some of the heads each."""
    channels = weight.shape[0]
    first = o.shape[2] // 3
    heads = [slice(None, first), slice(first, None)]
    parts = [o[:, :, part].contiguous() for part in heads]
    total = sum_of_squares(parts[0]) + sum_of_squares(parts[1])
    weights = [weight.view(o.shape[2:])[part].flatten() for part in heads]
    outputs = [
        with_sum(x, gate[:, :, part], w, total, channels, epsilon)
        for x, part, w in zip(parts, heads, weights, strict=True)
    ]
    return torch.cat(outputs, -1)


@kernels
@both_ways
def test_ranks_together_equal_the_whole(poisoned, ops):
    inputs = _normal(2, 5, 3, 64, seed=1), _fused(2, 5, 3, 64)[3], _normal(192, seed=2)
    _assert_agree(partial(_split, ops.heads_sum_of_squares, ops.gated_norm), _plain_on_one_rank, inputs)


def test_ranks_together_equal_the_whole_on_the_plain_path():
    inputs = _normal(2, 5, 3, 8, seed=1), _fused(2, 5, 3, 8)[3], _normal(24, seed=2)

    def with_sum(o, gate, weight, sum_squares, channels, epsilon):
        return gated_norm(o, gate, weight, epsilon, sum_squares, channels)

    _assert_agree(partial(_split, heads_sum_of_squares, with_sum), _plain_on_one_rank, inputs)
    _assert_agree(gated_norm, _plain_on_one_rank, inputs)


@kernels
def test_views_are_read_in_place():
    """Strided and contiguous inputs give the same bits, forward and backward."""
    views = _fused(2, 5, 3, 64)
    query, key, o, gate = views
    weight = _normal(64, seed=1)
    cos, sin = _angles(5, 64)
    d_query = _normal(2, 3, 5, 64).transpose(1, 2)
    strided = [
        *ops.norm_rope(query, key, weight, weight, cos, sin, EPSILON),
        *ops.norm_rope_backward(d_query, key, query, key, weight, weight, cos, sin, EPSILON),
        ops.gated_norm(o.contiguous(), gate, weight.repeat(3), None, 192, EPSILON),
    ]
    query, key, o, gate, d_query = (x.contiguous() for x in (*views, d_query))
    contiguous = [
        *ops.norm_rope(query, key, weight, weight, cos, sin, EPSILON),
        *ops.norm_rope_backward(d_query, key, query, key, weight, weight, cos, sin, EPSILON),
        ops.gated_norm(o, gate, weight.repeat(3), None, 192, EPSILON),
    ]
    assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))


@kernels
def test_gradients_repeat_bit_for_bit():
    query, key, o, gate = (x.contiguous() for x in _fused(1, 40, 3, 64))
    weight = _normal(64, seed=1)
    first, second = (
        [
            *ops.norm_rope_backward(o, gate, query, key, weight, weight, None, None, EPSILON),
            *ops.gated_norm_backward(query.flatten(2), o, gate, weight.repeat(3), None, 192, EPSILON),
        ]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _op_samples() -> list[tuple[str, tuple[object, ...]]]:
    query, key, o, gate = _fused(2, 3, 2, 16)
    o = o.contiguous()
    gradients = torch.ones_like(o), torch.ones_like(o)
    weight, weights, sums = torch.ones(16), torch.ones(32), torch.ones(2, 3)
    angles = _angles(3, 16)
    leaves = [x.detach().requires_grad_() for x in (query, key, weight, weight, o, gate, weights, sums)]
    return [
        ("norm_rope", (*leaves[:4], *angles, EPSILON)),
        ("norm_rope", (*leaves[:4], None, None, EPSILON)),
        ("norm_rope_backward", (*gradients, query, key, weight, weight, *angles, EPSILON)),
        ("gated_norm", (*leaves[4:7], None, 32, EPSILON)),
        ("gated_norm", (*leaves[4:8], 64, EPSILON)),
        ("gated_norm_backward", (gradients[0].flatten(2), o, gate, weights, None, 32, EPSILON)),
        ("gated_norm_backward", (gradients[0].flatten(2), o, gate, weights, sums, 64, EPSILON)),
        ("heads_sum_of_squares", (leaves[4],)),
        ("heads_sum_of_squares_backward", (sums, o)),
    ]


@kernels
@pytest.mark.parametrize("sample", range(9))
def test_opcheck(sample):
    name, arguments = _op_samples()[sample]
    torch.library.opcheck(getattr(ops, name).default, arguments)


@kernels
@both_ways
@pytest.mark.parametrize(("batch", "time"), [(0, 3), (2, 0)])
def test_empty_tensors(poisoned, ops, batch, time):
    x = torch.zeros(batch, time, 3, 16)
    weight, weights = torch.ones(16, requires_grad=True), torch.ones(48, requires_grad=True)
    cos, sin = _angles(time, 16)
    query, key = ops.norm_rope(x, x, weight, weight, cos, sin, EPSILON)
    y = ops.gated_norm(x, x, weights, None, 48, EPSILON)
    (query.sum() + key.sum() + y.sum()).backward()
    assert y.shape == (batch, time, 48)
    assert ops.heads_sum_of_squares(x).shape == (batch, time)
    assert not weight.grad.any()
    assert not weights.grad.any()


@kernels
@both_ways
@pytest.mark.parametrize("wrap", ["checkpoint", "compile"])
def test_checkpointing_and_compilation_change_nothing(ops, wrap):
    x = _fused(2, 3, 3, 16)[0]
    weight, weights = (_normal(n, seed=n).requires_grad_() for n in (16, 48))

    def block(x, weight, weights):
        query, key = ops.norm_rope(x, x, weight, weight, None, None, EPSILON)
        return ops.gated_norm(query, key, weights, ops.heads_sum_of_squares(query), 96, EPSILON)

    wrapped = (
        partial(checkpoint, block, use_reentrant=False)
        if wrap == "checkpoint"
        else torch.compile(block, backend="aot_eager", fullgraph=True)
    )
    ours, expected = (
        torch.autograd.grad(f(x, weight, weights).sum(), (weight, weights)) for f in (wrapped, block)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_cuda_tensors_go_to_the_operators():
    """Checks shapes, dtypes and the refusal of a strided o, with fake tensors, which need no device."""
    # Another test may have installed the CPU backend, a torch function mode to which "cuda" means "cpu".
    with torch._C.DisableTorchFunction(), FakeTensorMode():
        x = torch.empty(5, 2, 3, 64, dtype=torch.bfloat16, device="cuda").transpose(0, 1)
        weight, weights = torch.empty(64, device="cuda"), torch.empty(192, device="cuda")
        query, key = norm_rope(x, x, weight, weight, None, None, EPSILON)
        y = gated_norm(query, x, weights, EPSILON, heads_sum_of_squares(query), 384)
        assert query.is_contiguous() and key.is_contiguous() and y.is_cuda
        assert y.shape == (2, 5, 192) and y.dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"o\.contiguous\(\)"):
            gated_norm(x, x, weights, EPSILON)


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@kernels
def test_a_dispatch_mode_sees_one_operator():
    x, weight, weights = torch.ones(1, 2, 3, 16), torch.ones(16), torch.ones(48, requires_grad=True)
    with _Seen() as seen:
        query, _ = fused_norm_rope(x, x, weight, weight, None, None, EPSILON)
        fused_gated_norm(query, x, weights, None, 48, EPSILON).sum().backward()
    assert {
        f"hypenet.{name}.default" for name in ("norm_rope", "gated_norm", "gated_norm_backward")
    } <= seen.names


@kernels
def test_second_derivatives_are_refused():
    x, weights = torch.ones(1, 2, 3, 16, requires_grad=True), torch.ones(48)
    y = fused_gated_norm(x, x, weights, None, 48, EPSILON)
    with pytest.raises(
        RuntimeError, match=r"gated_norm has no second derivative; leave out create_graph=True"
    ):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_plain_references_pass_gradcheck():
    query, key, o, gate = (x.double().requires_grad_() for x in _fused(1, 2, 3, 4))
    weight, weights = (_normal(n, seed=n).double().requires_grad_() for n in (4, 12))
    sums = torch.rand(1, 2, dtype=torch.float64).requires_grad_()
    cos, sin = (x.double() for x in _angles(2, 4))
    check = torch.autograd.gradcheck
    assert check(lambda *x: plain_norm_rope(*x, cos, sin, EPSILON), (query, key, weight, weight))
    assert check(lambda *x: plain_norm_rope(*x, None, None, EPSILON), (query, key, weight, weight))
    assert check(lambda *x: _plain_on_one_rank(*x, EPSILON), (o, gate, weights))
    assert check(lambda *x: plain_gated_norm(*x, 20, EPSILON), (o, gate, weights, sums))
    assert check(plain_heads_sum_of_squares, (o,))


def test_rotation_keeps_norms_and_depends_on_distance_alone():
    """Checks the reference itself: unit mean square, and scores that depend on relative positions only."""
    x = _normal(1, 1, 1, 64).double().expand(1, 8, 1, 64)
    y = _normal(1, 1, 1, 64, seed=1).double().expand(1, 8, 1, 64)
    cos, sin = (angle.double() for angle in _angles(8, 64))
    ones = torch.ones(64, dtype=torch.float64)
    query, key = plain_norm_rope(x, y, ones, ones, cos, sin, 0.0)
    torch.testing.assert_close(query.square().mean(-1), torch.ones(1, 8, 1, dtype=torch.float64))
    scores = query[0, :, 0] @ key[0, :, 0].T
    torch.testing.assert_close(scores[3:, 3:], scores[:-3, :-3], rtol=1e-6, atol=1e-4)


def test_refusals_say_what_to_do():
    x, weight, weights = torch.ones(1, 2, 3, 4), torch.ones(4), torch.ones(12)
    cos, sin = _angles(2, 4)
    transposed = torch.ones(1, 2, 4, 3).transpose(2, 3)
    with pytest.raises(ValueError, match=r"query has stride 3 .* pass query\.contiguous\(\)"):
        norm_rope(transposed, x, weight, weight, cos, sin, EPSILON)
    with pytest.raises(ValueError, match=r"gate\.contiguous\(\)"):
        gated_norm(x, transposed, weights, EPSILON)
    with pytest.raises(ValueError, match="use bfloat16"):
        norm_rope(x.half(), x.half(), weight, weight, cos, sin, EPSILON)
    with pytest.raises(ValueError, match="use bfloat16"):
        gated_norm(x.half(), x.half(), weights, EPSILON, torch.ones(1, 2), 12)
    with pytest.raises(ValueError, match="pass both"):
        norm_rope(x, x, weight, weight, cos, None, EPSILON)
    with pytest.raises(ValueError, match=r"cos has shape \(2, 2\), expected \(1, 2\)"):
        norm_rope(x[:, :1], x[:, :1], weight, weight, cos, sin, EPSILON)
    with pytest.raises(ValueError, match="power of two"):
        norm_rope(x[..., :3], x[..., :3], weight[:3], weight[:3], None, None, EPSILON)
