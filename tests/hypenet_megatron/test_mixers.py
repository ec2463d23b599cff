"""Mixers are values: no code but their own names one, and the page about adding one shows the code that tests run."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
from pathlib import Path

import pytest

from hypenet_megatron.mixers import MIXERS, MixerSpec, mixer
from hypenet_megatron.presets import ModelShape

ROOT = Path(__file__).parents[2]
SHAPE = ModelShape("tiny", 4, 48, 80, query_heads=6, kv_groups=2, head_dim=16, vocab_size=96, tied_embeddings=True)
# Its spec and layer, the registry, its kernels, the default of the recipe, and the entry point of the kernels' package.
MAY_NAME_LIGHTNING = re.compile(
    r"hypenet_megatron/mixers/(lightning|lightning_layer|__init__)\.py|kernels/|halo_jobs/recipe\.py|tests/|benchmarks/"
)


def test_no_code_but_its_own_names_lightning():
    tracked = subprocess.run(
        ["git", "grep", "-il", "lightning", "--", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "hypenet_megatron/mixers/lightning.py" in tracked
    assert [name for name in tracked if not MAY_NAME_LIGHTNING.match(name)] == []


def test_page_shows_the_mixer_of_the_test_and_every_field():
    page = (ROOT / "docs" / "add-a-mixer.md").read_text()
    code = (ROOT / "tests" / "support" / "gated_delta.py").read_text()
    assert len(code.splitlines()) <= 150
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    assert [block for block in blocks if block not in code] == []
    documented = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(MixerSpec)]


@pytest.mark.parametrize("name", [*MIXERS, "tests.support.gated_delta:SPEC"])
def test_mixers_that_share_a_tensor_divide_it_alike(name):
    """A weights folder is cut by the name of a tensor alone, whichever mixer it belongs to."""
    for tensor in mixer(name).tensors:
        for other in (t for spec in MIXERS.values() for t in spec.tensors if t.name == tensor.name):
            assert (tensor.tensor_parallel, tensor.per_expert) == (other.tensor_parallel, other.per_expert)


def test_parameters_and_state_follow_from_the_shape():
    attention, lightning = mixer("attn"), mixer("lightning")
    queries, keys, hidden = 6 * 16, 2 * 16, 48
    assert attention.parameters(SHAPE) == hidden * (3 * queries + 2 * keys) + 2 * 16
    assert lightning.parameters(SHAPE) == hidden * 5 * queries + 2 * 16 + queries
    assert mixer("qwen3").parameters(SHAPE) == attention.parameters(SHAPE) - hidden * queries
    assert attention.state_shape(SHAPE) is None
    assert lightning.state_shape(SHAPE) == (6, 16, 16)
    assert math.prod(lightning.state_shape(SHAPE)) == 6 * 16**2
