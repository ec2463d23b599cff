"""Two processes sharing every layer compute what one process does: logits, loss, gradients, checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from halo_training.batches import TokenBatch
from halo_training.objectives import NextTokenObjective
from hypenet_megatron.config import DecoderConfig
from hypenet_megatron.model import DecoderModel
from hypenet_megatron.presets import ModelShape
from hypenet_megatron.runtime import ParallelLayout, model_parallel
from hypenet_tools.model_weights import load_weights, read_weights, save_weights
from tests.support.fork_server import run_ranks

RANKS = 2
SHAPE = ModelShape("tiny", 3, 48, 80, 4, 2, 16, 96, tied_embeddings=False)
LENGTH = 24


def _model(*, tensor_parallel: int = 1, sequence_parallel: bool = False) -> DecoderModel:
    config = DecoderConfig.from_shape(
        SHAPE,
        SHAPE.hybrid_mixers((1,), "lightning"),
        init_method_std=0.15,
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=sequence_parallel,
    )
    return DecoderModel(config)


def _batches() -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SHAPE.vocab_size, (2, 2, LENGTH + 1), generator=generator)
    weights = torch.rand(2, 2, LENGTH, generator=generator)
    return [
        TokenBatch(tokens[n, :, :-1].contiguous(), tokens[n, :, 1:].contiguous(), weights[n])
        for n in range(2)
    ]


def _gathered(local: Tensor, axis: int) -> Tensor:
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts, axis)


def _measured(model: DecoderModel) -> dict[str, np.ndarray]:
    """Logits [s, b, vocabulary], loss, and the gradient of every parameter, all of the whole model."""
    batches = _batches()
    model.train()
    with torch.no_grad():
        hidden = model.head_input(model(batches[0].input_ids))
        found = {"logits": _gathered(model.logits(hidden), -1)}
    objective = NextTokenObjective(model)
    objective.chunks[0].zero_grad_buffer()
    found["loss"] = objective.accumulate(batches)
    for name, parameter in model.named_parameters():
        gradient = parameter.main_grad
        if not getattr(parameter, "tensor_model_parallel", False):
            found[name] = gradient
        elif "linear_fc1" in name:  # each rank has its part of the gate above its part of the up projection
            found[name] = torch.cat([_gathered(half, 0) for half in gradient.chunk(2)])
        else:
            found[name] = _gathered(gradient, parameter.partition_dim)
    return {name: value.detach().numpy().copy() for name, value in found.items()}


def _rank_main(rank: int, folder: Path) -> None:
    with model_parallel(ParallelLayout(tensor=RANKS), seed=7):
        for sequence_parallel in (False, True):
            model = _model(tensor_parallel=RANKS, sequence_parallel=sequence_parallel)
            load_weights(folder / "one", model)
            found = _measured(model)
            if rank == 0:
                np.savez(folder / f"sequence_parallel_{sequence_parallel}.npz", **found)
        save_weights(folder / "two", model)


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="two gloo ranks on the CPU backend; with CUDA it is off"
)
def test_tensor_parallel_equals_one_process(megatron_cpu, tmp_path):
    single = _model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # norm weights of one, the same on both ranks, would hide a swapped shard
        for name, parameter in single.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    save_weights(tmp_path / "one", single)
    expected = _measured(single)
    run_ranks(RANKS, _rank_main, tmp_path)

    assert np.abs(expected["logits"]).max() > 0.5
    for sequence_parallel in (False, True):
        with np.load(tmp_path / f"sequence_parallel_{sequence_parallel}.npz") as found:
            assert set(found) == expected.keys()
            for name in expected:
                np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
    one, two = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
