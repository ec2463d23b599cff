"""The chunked form against the recurrence, in fp64."""

import math

import pytest
import torch

from hypenet_kernels import chunked_lightning_attention, decay_slopes
from tests.support.recurrent_attention import recurrent_lightning_attention


def _inputs(time: int, heads: int = 3, head_dim: int = 8, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(time)
    q, k, v = (torch.randn(2, time, heads, head_dim, generator=generator, dtype=dtype) for _ in range(3))
    state = torch.randn(2, heads, head_dim, head_dim, generator=generator, dtype=dtype)
    return q, k, v, torch.tensor(decay_slopes(heads)), state


def test_slopes_follow_the_published_rule():
    assert decay_slopes(4) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    forty = decay_slopes(40)
    assert len(forty) == 40
    assert forty[:32] == decay_slopes(32)
    assert forty[32:] == decay_slopes(64)[0:16:2]


@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_chunked_equals_recurrence_in_fp64(time):
    q, k, v, slopes, state = _inputs(time)
    expected, expected_state = recurrent_lightning_attention(q, k, v, slopes, 0.3, state)
    output, final_state = chunked_lightning_attention(q, k, v, slopes, 0.3, state)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final_state, expected_state, rtol=1e-10, atol=1e-10)


def test_segments_carry_the_state():
    """More chunks than in one segment, to exercise the loop over segments."""
    q, k, v, slopes, _ = _inputs(64 * 64 + 70, heads=2, head_dim=4)
    expected, _ = recurrent_lightning_attention(q, k, v, slopes, 1.0)
    output, _ = chunked_lightning_attention(q, k, v, slopes, 1.0)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


def test_one_call_equals_two_chained_calls():
    q, k, v, slopes, _ = _inputs(150)
    whole, whole_state = chunked_lightning_attention(q, k, v, slopes, 1.0)
    first, state = chunked_lightning_attention(q[:, :70], k[:, :70], v[:, :70], slopes, 1.0)
    second, state = chunked_lightning_attention(q[:, 70:], k[:, 70:], v[:, 70:], slopes, 1.0, state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, whole_state, rtol=1e-10, atol=1e-10)


def test_gradients_match_the_recurrence():
    q, k, v, slopes, state = _inputs(100)
    leaves = [x.requires_grad_() for x in (q, k, v, state)]
    weights = torch.randn_like(v)

    def gradients(attention):
        output, final_state = attention(*leaves[:3], slopes, 0.5, leaves[3])
        return torch.autograd.grad((output * weights).sum() + final_state.sin().sum(), leaves)

    for ours, expected in zip(
        gradients(chunked_lightning_attention), gradients(recurrent_lightning_attention), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_low_precision_error_against_fp64(dtype, bound):
    q, k, v, slopes, _ = _inputs(300, heads=4, head_dim=16)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    expected, _ = recurrent_lightning_attention(q.double(), k.double(), v.double(), slopes, 0.25)
    output, state = chunked_lightning_attention(q, k, v, slopes, 0.25)
    assert output.dtype == dtype
    assert state.dtype == torch.float32
    relative = (output.double() - expected).norm() / expected.norm()
    assert relative < bound
    assert math.isfinite(float(relative))
