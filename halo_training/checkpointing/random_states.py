"""Saves and restores the random generators of a process as tensors of its part of a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

_TRACKER = "tracker."


def random_states() -> dict[str, Tensor]:
    """States of the generators of Python, NumPy, torch and CUDA, and of Megatron's per-rank generators."""
    version, words, gauss = random.getstate()
    assert version == 3
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[_TRACKER + name] = state
    return {name: state.clone() for name, state in states.items()}


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Restore the generators to `states`, which `random_states` returned in a process of the same layout."""
    gauss = states["python.gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = states["numpy.position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy.gauss"].item()))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {
        name.removeprefix(_TRACKER): state.clone()
        for name, state in states.items()
        if name.startswith(_TRACKER)
    }
    get_cuda_rng_tracker().set_states(tracked)
