import pytest

from hypenet_megatron.runtime import model_parallel


@pytest.fixture
def megatron_cpu():
    """A Megatron world of one process on the CPU."""
    with model_parallel(seed=1) as device:
        yield device
