"""Fixtures shared by every room's tests."""

import atexit
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator

import pytest
import torch

from tests.cluster_sandbox import SlurmSandbox, hold_slurm_sandbox

# No test may reach a hub; every model and tokenizer is made or shipped here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU the Triton kernels run in Triton's interpreter; it has to be said before a kernel is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
# trust_remote_code copies modelling code to a folder of the user's. Here it is one fresh folder for the whole session:
# Python imports the package `transformers_modules` once, so a second folder would not be looked at.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="halo-tests-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def held_slurm(request: pytest.FixtureRequest) -> Iterator[SlurmSandbox]:
    yield from hold_slurm_sandbox(request)


@pytest.fixture
def slurm(held_slurm: SlurmSandbox) -> Iterator[SlurmSandbox]:
    """A real Slurm with nodes n1 to n4, all idle; one for the whole session."""
    held_slurm.heal()
    yield held_slurm
