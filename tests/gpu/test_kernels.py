"""The kernels on a GPU: bf16 head by head, a million tokens, determinism, graphs, compilation.

What the interpreter can check (shapes, states, packing, gradients in fp32) is in tests/kernels, which runs here too.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]

from hypenet_kernels import (  # noqa: E402
    chunked_cross_entropy,
    chunked_kl_divergence,
    chunked_lightning_attention,
    decay_slopes,
    gated_norm,
    lightning_attention,
    lightning_decode,
    norm_rope,
)
from hypenet_kernels.warm_up import lightning_calls, loss_calls  # noqa: E402

HEADS = 16
OVERALL, WORST_HEAD, FINAL_STATE = 4e-3, 5e-3, 3e-3


def _normal(*shape, dtype=torch.bfloat16):
    """Fresh at every run: the seed is the clock's, and a failure prints it."""
    return torch.randn(shape, device="cuda", dtype=dtype)


@pytest.fixture(autouse=True)
def fresh_numbers():
    print(f"torch.manual_seed({torch.seed()})")


def _errors(found, expected):
    """Relative L2 overall and of the worst head of [b, t, h, d]."""
    difference = (found.double() - expected).square().sum((0, 1, 3))
    size = expected.square().sum((0, 1, 3))
    return float((difference.sum() / size.sum()).sqrt()), float((difference / size).sqrt().max())


def _judge(q, k, v, do, slopes, scale, state=None, d_final=None):
    """fp64 output, final state and gradients of q, k, v (and the state), by the chunked path and autograd."""
    q, k, v, do = (x.double() for x in (q, k, v, do))
    rates = torch.tensor(slopes, dtype=torch.float64, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    state = None if state is None else state.double().requires_grad_()
    o, final = chunked_lightning_attention(*leaves, rates, scale, initial_state=state)
    outputs, upstream = ((o, final), (do, d_final.double())) if d_final is not None else ((o,), (do,))
    inputs = leaves if state is None else [*leaves, state]
    return o.detach(), final.detach(), torch.autograd.grad(outputs, inputs, upstream)


def _assert_heads(names, found, expected):
    for name, ours, judge in zip(names, found, expected, strict=True):
        overall, worst = _errors(ours, judge)
        assert overall <= OVERALL, f"{name}: {overall:.2e}"
        assert worst <= WORST_HEAD, f"{name}: worst head {worst:.2e}"


@pytest.mark.parametrize(
    ("batch", "time", "heads", "head_dim"),
    [(1, 1, 4, 128), (2, 63, 3, 64), (2, 64, 16, 128), (1, 65, 5, 128), (3, 1000, 16, 64), (1, 20_011, 16, 128),
     (8, 512, 32, 128)],
)  # fmt: skip
@pytest.mark.parametrize("exact", [False, True])
def test_bf16_every_head(batch, time, heads, head_dim, exact):
    slopes, scale = decay_slopes(heads), head_dim**-0.5
    leaves = [_normal(batch, time, heads, head_dim).requires_grad_() for _ in range(3)]
    state = (0.1 * _normal(batch, heads, head_dim, head_dim, dtype=torch.float32)).requires_grad_()
    do = _normal(batch, time, heads, head_dim)
    d_final = 0.1 * _normal(batch, heads, head_dim, head_dim, dtype=torch.float32)
    o, final = lightning_attention(
        *leaves, slopes, scale, initial_state=state, output_final_state=True, exact=exact
    )
    gradients = torch.autograd.grad((o, final), (*leaves, state), (do, d_final))
    expected, expected_final, expected_gradients = _judge(
        *(x.detach() for x in leaves), do, slopes, scale, state.detach(), d_final
    )
    _assert_heads(("o", "dq", "dk", "dv"), (o.detach(), *gradients[:3]), (expected, *expected_gradients[:3]))
    for name, ours, judge in (
        ("final state", final.detach(), expected_final),
        ("d initial state", gradients[3], expected_gradients[3]),
    ):
        assert float((ours.double() - judge).norm() / judge.norm()) <= FINAL_STATE, name


def test_a_million_tokens():
    """The far end of the promise. fp64 in pieces along time, handed on by the state."""
    time, heads, head_dim = 1_048_576, 4, 128
    slopes, scale = decay_slopes(heads), head_dim**-0.5
    q, k, v, do = (_normal(1, time, heads, head_dim) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, _ = lightning_attention(*leaves, slopes, scale)
    dq, dk, dv = torch.autograd.grad(o, leaves, do)
    rates = torch.tensor(slopes, dtype=torch.float64, device="cuda")

    def scan(a, b, c, backwards=False):
        state, pieces = None, []
        parts = [x.detach().flip(1) if backwards else x.detach() for x in (a, b, c)]
        for start in range(0, time, 65_536):
            piece = (x[:, start : start + 65_536].double() for x in parts)
            out, state = chunked_lightning_attention(*piece, rates, scale, initial_state=state)
            pieces.append(out.float())
        whole = torch.cat(pieces, 1)
        return whole.flip(1) if backwards else whole

    _assert_heads(("o", "dq"), (o.detach(), dq), (scan(q, k, v), scan(do, v, k)))
    _assert_heads(("dk", "dv"), (dk, dv), (scan(v, do, q, True), scan(k, q, do, True)))


def test_fp32_dots_and_tf32_on_request():
    slopes, scale = decay_slopes(HEADS), 128**-0.5
    q, k, v, do = (_normal(1, 777, HEADS, 128, dtype=torch.float32) for _ in range(4))
    expected, _, gradients = _judge(q, k, v, do, slopes, scale)
    for tf32, bound in ((False, 1e-6), (True, 1e-3)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o, _ = lightning_attention(*leaves, slopes, scale, tf32=tf32)
        found = (o.detach(), *torch.autograd.grad(o, leaves, do))
        for name, ours, judge in zip(("o", "dq", "dk", "dv"), found, (expected, *gradients), strict=True):
            assert _errors(ours, judge)[0] <= bound, name


def test_packed_sequences_do_not_see_each_other():
    lengths = (1, 700, 64, 3000, 63)
    boundaries = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    slopes, scale = decay_slopes(HEADS), 128**-0.5
    packed = [_normal(1, sum(lengths), HEADS, 128) for _ in range(3)]
    o, _ = lightning_attention(*packed, slopes, scale, cu_seqlens=boundaries)
    for ours, *pieces in zip(o.split(lengths, 1), *(x.split(lengths, 1) for x in packed), strict=True):
        alone, _ = lightning_attention(*pieces, slopes, scale)
        assert _errors(ours, alone.double())[0] <= OVERALL


def _layer(query, key, value, gate, weight, weights, cos, sin):
    q, k = norm_rope(query, key, weight, weight, cos, sin, 1e-6)
    o, _ = lightning_attention(q, k, value, decay_slopes(HEADS), 128**-0.5)
    return gated_norm(o, gate, weights, 1e-6)


def _layer_inputs(time=700):
    fused = _normal(2, time, HEADS, 4, 128).requires_grad_()
    weight, weights = _normal(128).requires_grad_(), _normal(HEADS * 128).requires_grad_()
    angles = torch.rand(time, 64, device="cuda") * 6
    return fused, weight, weights, angles.cos(), angles.sin()


def _run_layer(layer, inputs, upstream):
    fused, weight, weights, cos, sin = inputs
    y = layer(*fused.unbind(3), weight, weights, cos, sin)
    return y.detach(), *torch.autograd.grad(y, (fused, weight, weights), upstream)


@pytest.mark.parametrize("wrap", ["again", "checkpoint", "compile"])
def test_layer_is_deterministic_and_wraps(wrap):
    """The same bits twice, under activation checkpointing, and from torch.compile as one graph."""
    inputs, upstream = _layer_inputs(), _normal(2, 700, HEADS * 128)
    wrapped = {
        "again": _layer,
        "checkpoint": lambda *x: checkpoint(_layer, *x, use_reentrant=False),
        "compile": torch.compile(_layer, fullgraph=True),
    }[wrap]
    found, expected = (_run_layer(layer, inputs, upstream) for layer in (wrapped, _layer))
    for ours, theirs in zip(found, expected, strict=True):
        if wrap == "compile":  # inductor may add the parts of the fused gradient in another order
            assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) <= OVERALL
        else:
            assert torch.equal(ours, theirs)


def test_layer_and_decode_replay_from_a_cuda_graph():
    inputs, upstream = _layer_inputs(), _normal(2, 700, HEADS * 128)
    state = torch.zeros(3, HEADS, 128, 128, device="cuda")
    token = [_normal(3, HEADS, 128) for _ in range(3)]
    slots, out = torch.arange(3, device="cuda", dtype=torch.int32), _normal(3, HEADS, 128)

    def work():
        lightning_decode(*token, state, slots, decay_slopes(HEADS), 128**-0.5, out)
        return _run_layer(_layer, inputs, upstream)

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        inputs[0].copy_(_normal(*inputs[0].shape))
    state.zero_()
    graph.replay()
    torch.cuda.synchronize()
    replayed_out, replayed = out.clone(), [x.clone() for x in captured]
    state.zero_()
    expected = work()
    assert torch.equal(replayed_out, out)
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))


def test_parity_with_flash_linear_attention():
    simple_gla = pytest.importorskip("fla.ops.simple_gla")
    slopes, scale = decay_slopes(HEADS), 128**-0.5
    leaves = [_normal(2, 3000, HEADS, 128).requires_grad_() for _ in range(3)]
    do = _normal(2, 3000, HEADS, 128)
    rates = -torch.tensor(slopes, device="cuda")
    theirs, _ = simple_gla.chunk_simple_gla(*leaves, scale=scale, g_gamma=rates)
    ours, _ = lightning_attention(*leaves, slopes, scale)
    pairs = [(ours.detach(), theirs.detach())]
    pairs += zip(torch.autograd.grad(ours, leaves, do), torch.autograd.grad(theirs, leaves, do), strict=True)
    for mine, fla in pairs:
        assert _errors(mine, fla.double())[0] <= 2 * OVERALL


@pytest.mark.parametrize("loss", ["cross entropy", "KL"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_vocabulary_losses(loss, dtype, bound):
    tokens, hidden_size, vocabulary = 300, 256, 20_001
    hidden, teacher_hidden = (_normal(tokens, hidden_size, dtype=dtype) for _ in range(2))
    weight, teacher_weight = (_normal(vocabulary, hidden_size, dtype=dtype) * 0.1 for _ in range(2))
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda")
    shares = torch.rand(tokens, device="cuda")
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    student = wide[0] @ wide[1].t()
    if loss == "KL":
        ours = chunked_kl_divergence(*leaves, teacher_hidden, teacher_weight, shares, chunk_tokens=128)
        teacher = (teacher_hidden.double() @ teacher_weight.double().t()).log_softmax(-1)
        per_token = F.kl_div(student.log_softmax(-1), teacher, log_target=True, reduction="none").sum(-1)
    else:
        ours = chunked_cross_entropy(*leaves, labels, shares, chunk_tokens=128)
        per_token = F.cross_entropy(student, labels, reduction="none")
    expected = (per_token * shares).sum()
    assert float((ours - expected).abs() / expected) <= 1e-5
    for mine, judge in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, wide), strict=True
    ):
        assert float((mine.double() - judge).norm() / judge.norm()) <= bound


def test_warm_up_compiles_all_that_a_model_needs():
    device = torch.device("cuda")
    for _, call in [*lightning_calls(8, 128, torch.bfloat16, device), *loss_calls(1024, torch.bfloat16, device)]:
        call()
    torch.cuda.synchronize()
