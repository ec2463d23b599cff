"""Values and gradients of the chunked losses against those of torch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hypenet_kernels import chunked_cross_entropy, chunked_kl_divergence
from hypenet_megatron.runtime import joined_world
from tests.support.fork_server import run_ranks

TOKENS, HIDDEN, VOCABULARY = 23, 8, 12


def _inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype)
    teacher_hidden = torch.randn(TOKENS, HIDDEN + 2, generator=generator, dtype=dtype)
    teacher_weight = torch.randn(VOCABULARY, HIDDEN + 2, generator=generator, dtype=dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    token_weights = torch.rand(TOKENS, generator=generator)
    return hidden, weight, teacher_hidden, teacher_weight, labels, token_weights


def _torch_kl(hidden, weight, teacher_hidden, teacher_weight, token_weights):
    student = (hidden @ weight.t()).log_softmax(-1)
    teacher = (teacher_hidden @ teacher_weight.t()).log_softmax(-1)
    return (F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1) * token_weights).sum()


@pytest.mark.parametrize("chunk_tokens", [5, 64])
def test_cross_entropy(chunk_tokens):
    hidden, weight, _, _, labels, token_weights = _inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    ours = chunked_cross_entropy(hidden, weight, labels, token_weights, chunk_tokens=chunk_tokens)
    expected = (F.cross_entropy(hidden @ weight.t(), labels, reduction="none") * token_weights).sum()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(3 * ours, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [5, 64])
def test_kl_divergence(chunk_tokens):
    hidden, weight, teacher_hidden, teacher_weight, _, token_weights = _inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    ours = chunked_kl_divergence(
        hidden, weight, teacher_hidden, teacher_weight, token_weights, chunk_tokens=chunk_tokens
    )
    expected = _torch_kl(hidden, weight, teacher_hidden, teacher_weight, token_weights)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_kl_of_equal_models_is_zero():
    hidden, weight, *_, token_weights = _inputs()
    assert abs(float(chunked_kl_divergence(hidden, weight, hidden, weight, token_weights))) < 1e-6


def _vocabulary_parallel(rank: int, folder: Path):
    with joined_world():
        _vocabulary_parallel_in_world(rank, folder)


def _vocabulary_parallel_in_world(rank: int, folder: Path):
    hidden, weight, teacher_hidden, teacher_weight, labels, token_weights = _inputs()
    rows = slice(rank * VOCABULARY // 2, (rank + 1) * VOCABULARY // 2)
    hidden.requires_grad_()
    mine = weight[rows].clone().requires_grad_()
    kl = chunked_kl_divergence(
        hidden,
        mine,
        teacher_hidden,
        teacher_weight[rows],
        token_weights,
        group=dist.group.WORLD,
        chunk_tokens=7,
    )
    cross_entropy = chunked_cross_entropy(
        hidden, mine, labels, token_weights, group=dist.group.WORLD, chunk_tokens=7
    )
    gradients = torch.autograd.grad(kl + cross_entropy, (hidden, mine))
    torch.save([kl, cross_entropy, *gradients], folder / f"rank-{rank}.pt")


def test_vocabulary_split_over_two_ranks(tmp_path):
    run_ranks(2, _vocabulary_parallel, tmp_path)
    hidden, weight, teacher_hidden, teacher_weight, labels, token_weights = _inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    kl = _torch_kl(hidden, weight, teacher_hidden, teacher_weight, token_weights)
    cross_entropy = (F.cross_entropy(hidden @ weight.t(), labels, reduction="none") * token_weights).sum()
    hidden_gradient, weight_gradient = torch.autograd.grad(kl + cross_entropy, (hidden, weight))
    for rank in range(2):
        their_kl, their_cross_entropy, their_hidden, their_weight = torch.load(tmp_path / f"rank-{rank}.pt")
        assert their_kl.item() == pytest.approx(kl.item(), rel=1e-5)
        assert their_cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
        half = weight_gradient[rank * VOCABULARY // 2 : (rank + 1) * VOCABULARY // 2]
        torch.testing.assert_close(their_hidden, hidden_gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(their_weight, half, rtol=1e-4, atol=1e-5)
