"""The vocabulary losses with kernels: in the interpreter without CUDA, compiled with CUDA."""

import pytest
import torch
import torch.nn.functional as F

from hypenet_kernels import chunked_cross_entropy, chunked_kl_divergence, softmax_rows, vocabulary_losses

HIDDEN = 24
# Below, at and above one block of columns, and several blocks.
VOCABULARIES = [1, 100, 4096, 4097, 9001]


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch, poisoned_memory):
    functions = softmax_rows.softmax_row_statistics, softmax_rows.softmax_row_gradients
    monkeypatch.setattr(vocabulary_losses, "_row_functions", lambda hidden: functions)


def _normal(*shape, seed, device, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device)


def _case(tokens, vocabulary, device):
    return {
        "hidden": _normal(tokens, HIDDEN, seed=1, device=device),
        "weight": _normal(vocabulary, HIDDEN, seed=2, device=device, scale=0.7),
        "teacher_hidden": _normal(tokens, 16, seed=3, device=device),
        "teacher_weight": _normal(vocabulary, 16, seed=4, device=device, scale=0.7),
        "labels": torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(5)).to(
            device
        ),
        "token_weights": _normal(tokens, seed=6, device=device).abs(),
    }


def _expected(case, loss):
    case = {key: x.double() if x.is_floating_point() else x for key, x in case.items()}
    hidden, weight = (case[key].requires_grad_() for key in ("hidden", "weight"))
    logits = hidden @ weight.t()
    if loss == "cross entropy":
        per_token = F.cross_entropy(logits, case["labels"], reduction="none")
    else:
        teacher = (case["teacher_hidden"] @ case["teacher_weight"].t()).log_softmax(-1)
        per_token = F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="none").sum(-1)
    value = (per_token * case["token_weights"]).sum()
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def _ours(case, loss, **options):
    hidden, weight = (case[key].detach().requires_grad_() for key in ("hidden", "weight"))
    if loss == "cross entropy":
        value = chunked_cross_entropy(hidden, weight, case["labels"], case["token_weights"], **options)
    else:
        value = chunked_kl_divergence(
            hidden, weight, case["teacher_hidden"], case["teacher_weight"], case["token_weights"], **options
        )
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def _assert_close(found, expected, bound=1e-5):
    for name, ours, judge in zip(("loss", "hidden", "weight"), found, expected, strict=True):
        error = float(
            (ours.double() - judge).norm() / judge.norm().clamp(min=1.0)
        )  # a vocabulary of one: KL is 0
        assert error <= bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("loss", ["cross entropy", "KL"])
def test_against_torch_in_fp64(vocabulary, loss, kernel_device):
    case = _case(5, vocabulary, kernel_device)
    _assert_close(_ours(case, loss, chunk_tokens=3), _expected(case, loss))


@pytest.mark.parametrize("loss", ["cross entropy", "KL"])
def test_large_logits_do_not_overflow(loss, kernel_device):
    case = _case(3, 500, kernel_device)
    case["hidden"] *= 100
    case["teacher_hidden"] *= 100
    # With logits of several hundred, rounding of the matrix product changes probabilities by 1e-5.
    _assert_close(_ours(case, loss), _expected(case, loss), bound=2e-4)


def test_a_nan_reaches_the_loss(kernel_device):
    """The divergence guard of the training checks the loss only."""
    case = _case(3, 500, kernel_device)
    case["hidden"][1, 0] = float("nan")
    assert _ours(case, "KL")[0].isnan()
    assert _ours(case, "cross entropy")[0].isnan()


@pytest.mark.parametrize("loss", ["cross entropy", "KL"])
def test_two_ranks_combine_by_one_max_and_one_sum(loss, kernel_device, monkeypatch):
    """Two slices of the vocabulary. The patched reduction adds the other slice."""
    case = _case(4, 600, kernel_device)
    whole = _expected(case, loss)
    halves = [slice(0, 300), slice(300, 600)]
    parts = []
    for rank, half in enumerate(halves):
        student = case["hidden"] @ case["weight"][half].t()
        teacher = case["teacher_hidden"] @ case["teacher_weight"][half].t() if loss == "KL" else None
        labels = None if loss == "KL" else case["labels"]
        parts.append(softmax_rows.softmax_row_statistics(student, teacher, labels, rank * 300))
    maxima = torch.maximum(parts[0][0], parts[1][0])
    reduced = []

    def reduce(values, group, op):
        reduced.append(op)
        if op == torch.distributed.ReduceOp.MAX:
            return maxima
        other_maxima, other = parts[1 - reduce.rank]
        if values.shape == other.shape:
            fade = (other_maxima - maxima).exp()
            other = other.clone()
            other[: len(fade)] *= fade
            if loss == "KL":
                other[2] *= fade[1]
            return values + other
        return values  # the hidden gradient: its sum over ranks is taken below

    monkeypatch.setattr(vocabulary_losses, "_reduce", reduce)
    monkeypatch.setattr(vocabulary_losses, "_first_label", lambda vocabulary, group: reduce.rank * 300)
    results = []
    for rank, half in enumerate(halves):
        reduce.rank = rank
        reduced.clear()
        mine = {**case, "weight": case["weight"][half], "teacher_weight": case["teacher_weight"][half]}
        results.append(_ours(mine, loss))
        assert len(reduced) == 3, "one max and one sum for the statistics, one sum for the hidden gradient"
    for result in results:
        assert float((result[0].double() - whole[0]).abs() / whole[0]) <= 1e-5
    summed = (whole[0], results[0][1] + results[1][1], torch.cat([results[0][2], results[1][2]]))
    _assert_close(summed, whole)


@pytest.mark.parametrize("teacher", [True, False])
def test_operators_pass_opcheck(teacher, kernel_device):
    case = _case(3, 50, kernel_device)
    student = case["hidden"] @ case["weight"].t()
    other = case["teacher_hidden"] @ case["teacher_weight"].t() if teacher else None
    labels = None if teacher else case["labels"]
    arguments = (student, other, labels, 0)
    torch.library.opcheck(torch.ops.hypenet.softmax_row_statistics.default, arguments)
    log_totals = torch.stack([x.logsumexp(-1) for x in (student, other) if x is not None])
    torch.library.opcheck(
        torch.ops.hypenet.softmax_row_gradients.default,
        (*arguments, log_totals, case["token_weights"], torch.float32),
    )


def test_no_tokens_cost_nothing(kernel_device):
    case = _case(2, 50, kernel_device)
    case = {key: x[:0] if "weight" not in key or key == "token_weights" else x for key, x in case.items()}
    loss, _, weight_gradient = _ours(case, "KL")
    assert float(loss) == 0
    assert not weight_gradient.any()
