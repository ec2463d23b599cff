"""The calls of `halo kernels warmup`, on CPU tensors, where they run the PyTorch references."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from halo_jobs.cli import app
from hypenet_kernels.warm_up import lightning_calls, loss_calls


def all_calls(dtype, device):
    return [*lightning_calls(2, 64, dtype, device), *loss_calls(32, dtype, device)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_call_runs(dtype):
    calls = all_calls(dtype, torch.device("cpu"))
    assert len({what for what, _ in calls}) == len(calls)
    for _, call in calls:
        call()


def test_every_operator_is_called(monkeypatch):
    """Uses fake CUDA tensors, which need no device. Gradients need one, so tests/gpu checks them."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda x: None)
    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "hypenet":
                called.add(operator.__name__.partition(".")[0])
            return operator(*args, **(kwargs or {}))

    # Another test may have installed the CPU backend, a torch function mode to which "cuda" means "cpu".
    with torch._C.DisableTorchFunction(), FakeTensorMode(), Record():
        for _, call in all_calls(torch.bfloat16, torch.device("cuda")):
            call()
    assert called == {
        "lightning_attention",
        "norm_rope",
        "gated_norm",
        "heads_sum_of_squares",
        "lightning_decode",
        "lightning_decode_deferred",
        "softmax_row_statistics",
        "softmax_row_gradients",
    }


def test_command_says_what_it_would_do_and_what_it_lacks():
    def run(*arguments):
        return CliRunner().invoke(app, ["kernels", "warmup", *arguments])

    planned = run("--model", "qwen3-1.7b", "--model", "qwen3-0.6b", "--tensor-parallel", "2", "--dry-run")
    assert planned.exit_code == 0
    assert planned.output.splitlines()[0] == "8 heads of 128: Lightning Attention"
    assert len(planned.output.splitlines()) == len(set(planned.output.splitlines())), (
        "equal heads are compiled once"
    )
    assert "choose from qwen3-0.6b" in str(run("--model", "qwen9").exception)
    assert "3 does not divide the 16 heads of qwen3-1.7b" in str(run("--tensor-parallel", "3").exception)
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in str(run().exception)
