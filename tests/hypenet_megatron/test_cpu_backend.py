"""Megatron's CUDA requests on a machine without CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hypenet_megatron.runtime import cpu_backend, reset_seeds

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="stands in for CUDA only where there is none"
)


@pytest.fixture(autouse=True)
def installed():
    """Process-wide and for good, so this test may not be the first to install it."""
    cpu_backend.install()


def _fork():
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker().fork()  # seeding replaces the tracker


def test_install_is_idempotent():
    before = {name: getattr(torch.cuda, name) for name in ("current_device", "Stream", "get_rng_state")}
    mode = cpu_backend._installed
    depth = torch._C._len_torch_function_stack()
    assert cpu_backend.install() is False
    assert cpu_backend._installed is mode
    assert torch._C._len_torch_function_stack() == depth
    assert {name: getattr(torch.cuda, name) for name in before} == before


def test_never_installed_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu_backend, "_installed", None)
    assert cpu_backend.install() is False
    assert cpu_backend._installed is None


@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda", 1)], ids=str)
def test_cuda_names_mean_cpu(device):
    made = [
        torch.zeros(2, device=device),
        torch.tensor([1.0, 2.0], device=device),
        torch.arange(2, device=device, dtype=torch.float32),
        torch.ones(2).to(device),
        torch.ones(2).to(device, torch.float64),
        torch.ones(2).to(device=device, dtype=torch.float64),
        torch.ones(2).new_zeros(2, device=device),
        nn.Linear(2, 2, device=device).to(device).cuda().weight,
    ]
    assert {str(tensor.device) for tensor in made} == {"cpu"}
    assert made[5].dtype == made[4].dtype == torch.float64
    assert made[1].tolist() == [1.0, 2.0]


def test_cuda_and_pinning_hand_the_tensor_back():
    tensor = torch.ones(3)
    assert tensor.cuda() is tensor
    assert tensor.pin_memory() is tensor
    assert not torch.zeros(2, pin_memory=True).is_pinned()


def test_type_names_are_those_of_cuda():
    """Megatron groups gradients by these names; types are still converted as asked."""
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.int64).dtype == torch.int64


def test_other_devices_are_left_alone():
    assert torch.zeros(2, device="meta").is_meta
    assert torch.zeros(2).to("meta").is_meta


def test_streams_events_and_device():
    assert torch.cuda.current_device() == torch.device("cpu")
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        event.record()
    stream.wait_event(event)
    stream.wait_stream(torch.cuda.current_stream())
    assert stream.query()
    assert stream.record_event().query()


def test_cuda_generator_is_the_cpu_one():
    torch.cuda.manual_seed(11)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.rand(4).equal(first)
    torch.manual_seed(11)
    assert torch.rand(4).equal(first)


def test_fork_leaves_the_outer_stream_alone(megatron_cpu):
    torch.manual_seed(5)
    undisturbed = torch.rand(6)
    torch.manual_seed(5)
    before = torch.rand(3)
    with _fork():
        inside = torch.rand(3)
    after = torch.rand(3)
    assert torch.cat([before, after]).equal(undisturbed)
    assert not inside.equal(after)


def test_fork_goes_on_where_the_last_one_ended(megatron_cpu):
    def draw(*counts: int) -> torch.Tensor:
        reset_seeds(9)
        parts = []
        for count in counts:
            torch.rand(7)  # moves only the outer stream
            with _fork():
                parts.append(torch.rand(count))
        return torch.cat(parts)

    whole, halves = draw(8), draw(4, 4)
    assert halves.equal(whole)
    assert not halves[:4].equal(halves[4:])


def test_fork_restores_after_an_error(megatron_cpu):
    outside = torch.get_rng_state()
    with pytest.raises(KeyError), _fork():
        torch.rand(3)
        raise KeyError
    assert torch.get_rng_state().equal(outside)
