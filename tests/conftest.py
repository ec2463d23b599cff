"""Fixtures shared by every room's tests."""

import os
import socket

import pytest

# No test may reach a hub; every model and tokenizer is made or shipped here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
