"""Kernels run on the GPU if there is one, otherwise in Triton's interpreter (only fp32: its bf16 dots are wrong)."""

import pytest
import torch


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fill torch.empty with NaN, to detect elements that a kernel does not write."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
