"""The kernels run on the GPU if there is one, else in Triton's interpreter (fp32 only: its bf16 dots are wrong)."""

import pytest
import torch


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_memory(monkeypatch):
    """torch.empty returns NaN, so that what a kernel does not write shows."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
