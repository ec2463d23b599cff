"""Decoding steps against the recurrence in fp64: slots in any order, unused rows, deferred states."""

import pytest
import torch

from hypenet_kernels.decode import (
    WINDOW,
    lightning_decode,
    plain_lightning_decode,
    plain_lightning_decode_deferred,
)

HEADS, HEAD_DIM, SLOTS = 2, 64, 5
SLOPES = [0.5, 0.1]
SCALE = 0.3
BOUND = 1e-6


def _tokens(device, steps, batch):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, 3, batch, HEADS, HEAD_DIM, generator=generator).to(device)


def _relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def _judge(tokens, state, slots):
    """Outputs [steps, batch, ...] and the pool of states after the last step, in fp64."""
    state, outputs = state.double(), []
    for q, k, v in tokens.double():
        outputs.append(torch.empty_like(q))
        plain_lightning_decode(q, k, v, state, slots, SLOPES, SCALE, outputs[-1])
    return torch.stack(outputs), state


def test_the_plain_step_is_the_recurrence():
    from tests.support.recurrent_attention import recurrent_lightning_attention

    tokens = _tokens("cpu", 6, 1).double()
    initial = torch.randn(1, HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    outputs, state = _judge(tokens, initial.clone(), torch.tensor([0]))
    q, k, v = tokens[:, :, 0].transpose(0, 1)[:, None]
    expected, final = recurrent_lightning_attention(q, k, v, torch.tensor(SLOPES), SCALE, initial)
    torch.testing.assert_close(outputs[:, 0], expected[0])
    torch.testing.assert_close(state, final)


def test_in_place(kernel_device):
    tokens = _tokens(kernel_device, 3, 4)
    slots = torch.tensor([3, -1, 0, 4], device=kernel_device)
    state = torch.randn(SLOTS, HEADS, HEAD_DIM, HEAD_DIM, device=kernel_device)
    expected, expected_state = _judge(tokens, state.clone(), slots)
    for step, (q, k, v) in enumerate(tokens):
        out = torch.full_like(q, float("nan"))
        torch.ops.hypenet.lightning_decode(q, k, v, state, slots, SLOPES, SCALE, out)
        assert _relative(out, expected[step]) <= BOUND
        assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert _relative(state, expected_state) <= BOUND


@pytest.mark.parametrize("strided", [False, True])
def test_deferred_over_two_windows(kernel_device, strided):
    """Windows start as NaN, so that entries that were not written would show."""
    steps = 2 * WINDOW + 3
    tokens = _tokens(kernel_device, steps, 3)
    slots = torch.tensor([2, 4, 1], device=kernel_device)
    state = torch.randn(SLOTS, HEADS, HEAD_DIM, HEAD_DIM, device=kernel_device)
    expected, _ = _judge(tokens, state.clone(), slots)
    windows = torch.full((2, SLOTS, HEADS, WINDOW, HEAD_DIM), float("nan"), device=kernel_device)
    pending = torch.zeros(3, dtype=torch.int32, device=kernel_device)
    for step, (q, k, v) in enumerate(tokens):
        if strided:
            q, k, v = torch.stack([q, k, v], 2).unbind(2)
        out = torch.full(q.shape, float("nan"), device=kernel_device)
        torch.ops.hypenet.lightning_decode_deferred(
            q, k, v, state, *windows, slots, pending, SLOPES, SCALE, out
        )
        pending = (pending + 1) % WINDOW
        assert _relative(out, expected[step]) <= BOUND


def test_deferred_state_after_full_windows(kernel_device):
    """A state is written exactly when the window is full."""
    tokens = _tokens(kernel_device, WINDOW, 2)
    slots = torch.tensor([0, 3], device=kernel_device)
    state = torch.randn(SLOTS, HEADS, HEAD_DIM, HEAD_DIM, device=kernel_device)
    start = state.clone()
    _, expected = _judge(tokens, state.clone(), slots)
    windows = torch.zeros(2, SLOTS, HEADS, WINDOW, HEAD_DIM, device=kernel_device)
    for step, (q, k, v) in enumerate(tokens):
        assert torch.equal(state, start)
        pending = torch.full((2,), step, dtype=torch.int32, device=kernel_device)
        out = torch.empty_like(q)
        torch.ops.hypenet.lightning_decode_deferred(
            q, k, v, state, *windows, slots, pending, SLOPES, SCALE, out
        )
    assert _relative(state[slots], expected[slots]) <= BOUND
    assert torch.equal(state[[1, 2, 4]], start[[1, 2, 4]])


def test_plain_deferred_equals_in_place():
    tokens = _tokens("cpu", WINDOW + 2, 2).double()
    slots = torch.tensor([1, -1])
    state = torch.randn(SLOTS, HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    expected, _ = _judge(tokens, state.clone(), slots)
    windows = torch.zeros(2, SLOTS, HEADS, WINDOW, HEAD_DIM, dtype=torch.float64)
    for step, (q, k, v) in enumerate(tokens):
        out = torch.empty_like(q)
        pending = torch.tensor([step % WINDOW] * 2)
        plain_lightning_decode_deferred(q, k, v, state, *windows, slots, pending, SLOPES, SCALE, out)
        torch.testing.assert_close(out, expected[step])


def test_operator_contract(kernel_device):
    q, k, v = _tokens(kernel_device, 1, 2)[0]
    state = torch.randn(SLOTS, HEADS, HEAD_DIM, HEAD_DIM, device=kernel_device)
    windows = torch.randn(2, SLOTS, HEADS, WINDOW, HEAD_DIM, device=kernel_device)
    slots = torch.tensor([2, 0], device=kernel_device)
    pending = torch.tensor([3, 15], dtype=torch.int32, device=kernel_device)
    out = torch.empty_like(q)
    torch.library.opcheck(
        torch.ops.hypenet.lightning_decode.default, (q, k, v, state, slots, SLOPES, SCALE, out)
    )
    torch.library.opcheck(
        torch.ops.hypenet.lightning_decode_deferred.default,
        (q, k, v, state, *windows, slots, pending, SLOPES, SCALE, out),
    )


def test_refuses_a_pool_of_the_wrong_shape():
    q = torch.zeros(1, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=r"state must be contiguous float32 \[slots, 2, 64, 64\]"):
        lightning_decode(q, q, q, torch.zeros(5, 2, 64, 32), torch.tensor([0]), SLOPES, 1.0, q.clone())
