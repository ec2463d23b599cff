"""The Triton kernels of Lightning Attention against the token-by-token recurrence in fp64."""

import itertools

import pytest
import torch

import hypenet_kernels.lightning_ops as ops
from hypenet_kernels import decay_slopes
from hypenet_kernels.segments import batch_items, packed_items
from hypenet_kernels.tiles import TILES, DeviceLimits
from tests.support.recurrent_attention import recurrent_lightning_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CHUNK = TILES["forward", torch.float32][0].chunk
BOUND = 1e-6  # relative L2 of fp32 against fp64
SCALE = 0.3


@pytest.fixture(params=[1, 64], ids=["few multiprocessors", "many multiprocessors"])
def multiprocessors(request, monkeypatch):
    """With many multiprocessors short sequences are cut into segments with halos, with few they are not."""
    limits = DeviceLimits("test", (9, 0), request.param, 2**20)
    monkeypatch.setattr(ops, "device_limits", lambda device: limits)
    monkeypatch.setattr(ops, "_launches", {})  # those present are for another number of multiprocessors
    return request.param


def _inputs(device, batch, time, heads, head_dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, time, heads, head_dim)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(4)]


def _run(q, k, v, slopes, state=None, cu_seqlens=None, exact=False):
    return torch.ops.hypenet.lightning_attention(
        q, k, v, state, cu_seqlens, slopes, SCALE, exact, True, False
    )


def _relative(found, expected):
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def _assert_matches(leaves, slopes, do, d_final, run):
    """Output, final state and every gradient of `run` against the recurrence in fp64."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    judges = [x.detach().double().requires_grad_() for x in leaves]
    o, final = run(*leaves)
    rates = torch.tensor(slopes, dtype=torch.float64, device=do.device)
    state = judges[3] if len(judges) == 4 else None
    expected, expected_final = recurrent_lightning_attention(*judges[:3], rates, SCALE, state)
    found = torch.autograd.grad((o * do).sum() + (final * d_final).sum(), leaves)
    wanted = torch.autograd.grad((expected * do).sum() + (expected_final * d_final).sum(), judges)
    pairs = [(o, expected), (final, expected_final), *zip(found, wanted, strict=True)]
    assert all(_relative(a, b.detach()) <= BOUND for a, b in pairs), [_relative(a, b) for a, b in pairs]


@pytest.mark.parametrize("time", [1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 7])
@pytest.mark.parametrize(("head_dim", "with_state"), [(64, True), (128, False)])
def test_kernels_match_the_recurrence(kernel_device, multiprocessors, time, head_dim, with_state):
    q, k, v, do = _inputs(kernel_device, 2, time, 2, head_dim)
    states = torch.randn(2, 2, 2, head_dim, head_dim, device=kernel_device)
    slopes = [0.7, 0.2]
    leaves = [q, k, v, states[0]] if with_state else [q, k, v]
    _assert_matches(leaves, slopes, do, states[1], lambda *x: _run(*x[:3], slopes, x[3] if x[3:] else None))


def test_segments_are_cut_in_the_tests_above():
    """Otherwise these tests would have no halo."""
    slopes = (0.7, 0.2)
    assert len(batch_items(slopes, 2, 5 * CHUNK + 7, CHUNK, 64, False, torch.device("cpu"))) > 2 * 2
    assert len(batch_items(slopes, 2, 5 * CHUNK + 7, CHUNK, 64, True, torch.device("cpu"))) == 2 * 2


def test_halo_equals_exact(kernel_device, multiprocessors):
    q, k, v, _ = _inputs(kernel_device, 1, 9 * CHUNK + 5, 3, 64)
    slopes = [1.0, 0.5, 0.25]
    o, final = _run(q, k, v, slopes)
    exact, exact_final = _run(q, k, v, slopes, exact=True)
    assert _relative(o, exact.double()) <= 2e-7
    assert _relative(final, exact_final.double()) <= 2e-7


@pytest.mark.parametrize("split", [1, CHUNK, 2 * CHUNK + 3])
def test_one_call_equals_chained_calls(kernel_device, multiprocessors, split):
    q, k, v, _ = _inputs(kernel_device, 1, 4 * CHUNK + 3, 2, 64)
    slopes = decay_slopes(2)
    whole, whole_state = _run(q, k, v, slopes)
    first, state = _run(q[:, :split], k[:, :split], v[:, :split], slopes)
    second, state = _run(q[:, split:], k[:, split:], v[:, split:], slopes, state)
    assert _relative(torch.cat([first, second], 1), whole.double()) <= BOUND
    assert _relative(state, whole_state.double()) <= BOUND


def test_packed_sequences_do_not_see_each_other(kernel_device, multiprocessors):
    """Sequences of no token, one token, a chunk and more; with initial and final states, and their gradients."""
    lengths = [CHUNK + 9, 0, 1, 3 * CHUNK, 5]
    bounds = list(itertools.accumulate(lengths, initial=0))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=kernel_device)
    q, k, v, do = _inputs(kernel_device, 1, bounds[-1], 2, 64)
    initial, d_final = torch.randn(2, len(lengths), 2, 64, 64, device=kernel_device)
    slopes = [0.7, 0.2]
    leaves = [x.requires_grad_() for x in (q, k, v, initial)]
    o, final = _run(q, k, v, slopes, initial, cu_seqlens)
    packed = torch.autograd.grad((o * do).sum() + (final * d_final).sum(), leaves)
    assert torch.equal(final[1], initial[1])
    assert torch.equal(packed[3][1], d_final[1])
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        part = [x[:, start:end].detach().requires_grad_() for x in (q, k, v)]
        part.append(initial[number : number + 1].detach().requires_grad_())
        alone, alone_final = _run(*part[:3], slopes, part[3])
        wanted = torch.autograd.grad(
            (alone * do[:, start:end]).sum() + (alone_final * d_final[number]).sum(), part
        )
        assert _relative(o[:, start:end], alone.double()) <= BOUND
        assert _relative(final[number], alone_final[0].double()) <= BOUND
        for found, expected in zip(packed[:3], wanted[:3], strict=True):
            assert _relative(found[:, start:end], expected.double()) <= BOUND
        assert _relative(packed[3][number], wanted[3][0].double()) <= BOUND


def test_work_lists_cover_every_chunk_once():
    """Every chunk of every sequence and head is computed exactly once, in plain and packed work lists."""
    slopes = tuple(decay_slopes(5))
    for time, slots in itertools.product([1, 64, 65, 4096, 20_000], [1, 7, 132, 264]):
        items = batch_items(slopes, 2, time, 64, slots, False, torch.device("cpu"))
        covered = {(n, head, c) for n, head, _, _, _, a, b, _ in items.tolist() for c in range(a, b)}
        assert len(covered) == sum(b - a for *_, a, b, _ in items.tolist()) == 2 * 5 * -(-time // 64)
        lengths = [time // 3, 0, time - time // 3]
        bounds = torch.tensor([0, *itertools.accumulate(lengths)])
        packed = packed_items(slopes, bounds, time, 64, slots, False)
        seen = [
            (n, head, c) for n, head, row, *_, a, b, _ in packed.tolist() for c in range(a, b) if row == 0
        ]
        assert sorted(seen) == [
            (n, head, c) for n, m in enumerate(lengths) for head in range(5) for c in range(-(-m // 64))
        ]


def test_views_of_a_fused_projection_and_expanded_gradients(kernel_device):
    q, k, v, do = _inputs(kernel_device, 2, 50, 2, 64)
    slopes = [0.7, 0.2]
    fused = torch.stack([q, k, v], 3).transpose(0, 1).contiguous()  # [time, batch, heads, 3, head_dim]
    views = [x.transpose(0, 1) for x in fused.unbind(3)]
    assert not any(x.is_contiguous() for x in views)
    assert torch.equal(_run(*views, slopes)[0], _run(q, k, v, slopes)[0])
    leaf = v.clone().requires_grad_()
    (from_sum,) = torch.autograd.grad(_run(q, k, leaf, slopes)[0].sum(), leaf)
    (from_ones,) = torch.autograd.grad((_run(q, k, leaf, slopes)[0] * torch.ones_like(do)).sum(), leaf)
    assert torch.equal(from_sum, from_ones)


@pytest.mark.parametrize("with_state", [False, True])
def test_without_the_dispatcher_the_same_bits(kernel_device, with_state):
    *leaves, do = (x.requires_grad_() for x in _inputs(kernel_device, 1, 70, 2, 64))
    state = torch.ones(1, 2, 64, 64, device=kernel_device, requires_grad=True) if with_state else None
    inputs = leaves if state is None else [*leaves, state]
    dispatched = torch.ops.hypenet.lightning_attention(
        *leaves, state, None, [0.7, 0.2], SCALE, False, with_state, False
    )
    eager = ops.fused_lightning_attention(*leaves, state, None, [0.7, 0.2], SCALE, False, with_state, False)
    results = []
    for outputs in (dispatched, eager):
        loss = (outputs[0] * do).sum() + outputs[1].sum()
        results.append((*outputs, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_same_bits_from_run_to_run(kernel_device, multiprocessors):
    q, k, v, do = _inputs(kernel_device, 1, 5 * CHUNK, 2, 64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    runs = []
    for _ in range(2):
        o, final = _run(q, k, v, [0.7, 0.2])
        runs.append([o, final, *torch.autograd.grad((o * do).sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_operator_contract(kernel_device, packed, monkeypatch):
    """Schema, fake tensors, autograd registration and dynamic shapes, as torch.compile relies on them."""
    monkeypatch.undo()  # opcheck also compares outputs filled with NaN
    q, k, v, _ = _inputs(kernel_device, 1, 40, 2, 64)
    cu_seqlens = torch.tensor([0, 13, 40], device=kernel_device) if packed else None
    state = torch.randn(2 if packed else 1, 2, 64, 64, device=kernel_device)
    leaves = [x.requires_grad_() for x in (q, k, v, state)]
    torch.library.opcheck(
        torch.ops.hypenet.lightning_attention.default,
        (*leaves, cu_seqlens, [0.7, 0.2], SCALE, False, True, False),
    )


@pytest.mark.parametrize("attention", ["recurrent", "chunked"])
def test_references_are_differentiable_in_fp64(attention):
    from hypenet_kernels import chunked_lightning_attention

    function = {"recurrent": recurrent_lightning_attention, "chunked": chunked_lightning_attention}[attention]
    leaves = [torch.randn(1, 5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    leaves.append(torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True))
    slopes = torch.tensor([0.7, 0.2], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v, s: function(q, k, v, slopes, SCALE, s), leaves)


class TestPublicFunction:
    def test_packed_on_cpu_equals_the_kernels(self):
        q, k, v, _ = _inputs("cpu", 1, 60, 2, 64)
        cu_seqlens = torch.tensor([0, 20, 20, 60])
        state = torch.randn(3, 2, 64, 64)
        o, final = ops.lightning_attention(
            q, k, v, [0.7, 0.2], SCALE, initial_state=state, cu_seqlens=cu_seqlens, output_final_state=True
        )
        parts = [
            recurrent_lightning_attention(
                *(x[:, a:b].double() for x in (q, k, v)), torch.tensor([0.7, 0.2]), SCALE, state[n : n + 1]
            )
            for n, (a, b) in enumerate([(0, 20), (20, 60)])
            for n in [0 if a == 0 else 2]
        ]
        assert _relative(o, torch.cat([o for o, _ in parts], 1)) <= BOUND
        assert torch.equal(final[1], state[1])
        assert _relative(final[[0, 2]], torch.cat([s for _, s in parts])) <= BOUND

    def test_refuses_what_it_would_misread(self):
        q, k, v, _ = _inputs("cpu", 2, 8, 2, 64)
        with pytest.raises(ValueError, match="bfloat16 or float32"):
            ops.lightning_attention(q.half(), k.half(), v.half(), [1.0, 0.5], 1.0)
        with pytest.raises(ValueError, match="repeat shared key heads"):
            ops.lightning_attention(q, k[:, :, :1], v, [1.0, 0.5], 1.0)
        with pytest.raises(ValueError, match="slopes has 1 entries for 2 heads"):
            ops.lightning_attention(q, k, v, [1.0], 1.0)
        with pytest.raises(ValueError, match="batch must be 1"):
            ops.lightning_attention(q, k, v, [1.0, 0.5], 1.0, cu_seqlens=torch.tensor([0, 8]))
        with pytest.raises(ValueError, match=r"initial_state must be \[2, 2, 64, 64\]"):
            ops.lightning_attention(q, k, v, [1.0, 0.5], 1.0, initial_state=torch.zeros(2, 2, 64, 32))
