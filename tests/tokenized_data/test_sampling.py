"""Every window occurs once per epoch, in an order that depends only on (seed, sample)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenized_data.conftest import SHARD_TOKENS
from tokenized_data import BlendedSampler, TokenStore, WindowSampler
from tokenized_data.sampling import _schedule, permuted

CONTEXT = 10


@pytest.fixture
def sampler(counting_store):
    return WindowSampler(counting_store(1_007, "prose"), CONTEXT, seed=1)


def _positions(sampler: WindowSampler | BlendedSampler, samples: range) -> list[int]:
    return [sampler.window(sample).position for sample in samples]


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(size, key):
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_permutation_is_the_same_everywhere():
    """Golden values: another order would change the data of a resumed run."""
    assert [permuted(index, 1_000, 42) for index in range(6)] == [483, 688, 207, 931, 101, 83]


def test_permutation_of_a_large_range_scatters():
    size = 10**12 + 39
    images = np.array([permuted(index, size, 7) for index in range(4_000)])
    assert len(set(images.tolist())) == 4_000
    assert images.min() >= 0
    assert images.max() < size
    counts, _ = np.histogram(images, bins=8, range=(0, size))
    assert counts.min() > 400  # 500 expected, with a standard deviation of 21
    assert counts.max() < 600
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.1


def test_window(sampler):
    window = sampler.window(3)
    assert window.source == "prose"
    assert window.tokens.dtype == np.int64
    assert window.loss_weights.dtype == np.float32
    np.testing.assert_array_equal(
        window.tokens, np.arange(window.position, window.position + CONTEXT + 1) % 1_000
    )
    np.testing.assert_array_equal(window.loss_weights, np.ones(CONTEXT, np.float32))


def test_loss_weights_belong_to_the_labels(write_store):
    store = TokenStore.open(write_store([np.arange(500)], weighted=True))
    window = WindowSampler(store, CONTEXT, seed=1).window(0)
    np.testing.assert_array_equal(window.loss_weights, window.tokens[1:] % 5)


def test_every_window_once_per_epoch(sampler):
    assert sampler.num_windows == 100
    everything = list(range(0, 1_000, CONTEXT))
    epochs = [_positions(sampler, range(epoch * 100, epoch * 100 + 100)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == everything
        assert epoch != everything
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_windows_that_cross_shard_borders(counting_store):
    """All windows together are the store, with each label once."""
    length = 2 * SHARD_TOKENS + 5_000
    context = 1_013  # no divisor of a shard
    sampler = WindowSampler(counting_store(length, "sharded"), context, seed=1)
    crossing = 0
    seen = np.full(length, -1)
    for sample in range(sampler.num_windows):
        window = sampler.window(sample)
        labels = slice(window.position + 1, window.position + context + 1)
        assert (seen[labels] == -1).all()
        seen[labels] = window.tokens[1:]
        assert window.tokens[0] == window.position % 1_000
        crossing += window.position // SHARD_TOKENS != (window.position + context) // SHARD_TOKENS
    assert crossing == 2
    covered = sampler.num_windows * context
    assert length - covered <= context
    np.testing.assert_array_equal(seen[1 : covered + 1], np.arange(1, covered + 1) % 1_000)


def test_last_window_ends_with_the_store(counting_store):
    assert WindowSampler(counting_store(101, "exact"), CONTEXT, seed=1).num_windows == 10
    assert WindowSampler(counting_store(100, "one short"), CONTEXT, seed=1).num_windows == 9
    single = WindowSampler(counting_store(CONTEXT + 1, "single"), CONTEXT, seed=1)
    assert _positions(single, range(3)) == [0, 0, 0]


def test_seed_decides_the_order(sampler, counting_store):
    same = WindowSampler(counting_store(1_007, "prose"), CONTEXT, seed=1)
    other = WindowSampler(counting_store(1_007, "prose"), CONTEXT, seed=2)
    assert _positions(same, range(100)) == _positions(sampler, range(100))
    assert _positions(other, range(100)) != _positions(sampler, range(100))


def test_resuming_is_asking_for_the_next_sample(sampler, counting_store):
    straight = _positions(sampler, range(250))
    fresh = WindowSampler(counting_store(1_007, "prose"), CONTEXT, seed=1)
    assert _positions(fresh, range(137, 250)) == straight[137:]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_order_does_not_depend_on_the_number_of_ranks(sampler, counting_store, ranks):
    """Rank r of n reads every n-th sample, with a separate sampler like a separate process."""
    seen: dict[int, int] = {}
    for rank in range(ranks):
        own = WindowSampler(counting_store(1_007, "prose"), CONTEXT, seed=1)
        seen |= {sample: own.window(sample).position for sample in range(rank, 160, ranks)}
    assert [seen[sample] for sample in range(160)] == _positions(sampler, range(160))


def test_context_longer_than_the_corpus(counting_store):
    with pytest.raises(
        ValueError, match=r"short has 1,007 tokens, too few for one window of context_length 1007"
    ):
        WindowSampler(counting_store(1_007, "short"), 1_007, seed=1)


@given(draws=st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any))
@settings(max_examples=100, deadline=None)
def test_counts_never_stray_a_whole_sample(draws):
    period = sum(draws)
    sources, before = _schedule(period, draws)
    chosen = sources[:, None] == np.arange(len(draws))
    counts = np.cumsum(chosen, axis=0)
    expected = np.outer(np.arange(1, period + 1), draws) / period
    assert np.abs(counts - expected).max() < 1
    np.testing.assert_array_equal(before, counts[np.arange(period), sources] - 1)


@pytest.mark.parametrize(
    "proportions", [[1.0], [0.65, 0.35], [1 / 3, 1 / 3, 1 / 3], [0.0, 1.0 - 0.123456789, 0.123456789]]
)
def test_blend(counting_store, proportions):
    """Each source contributes its samples 0, 1, 2 ... in order, and its share of any number of samples."""
    samplers = [
        WindowSampler(counting_store(400 + 10 * n, f"source {n}"), CONTEXT, seed=n)
        for n in range(len(proportions))
    ]
    blend = BlendedSampler(samplers, proportions)
    given = [0] * len(proportions)
    for sample in range(1_000):
        window = blend.window(sample)
        source = int(window.source.removeprefix("source "))
        assert window.position == samplers[source].window(given[source]).position
        given[source] += 1
        for count, proportion in zip(given, proportions, strict=True):
            assert abs(count - proportion * (sample + 1)) < 1 + 1e-6


def test_blend_partitioned_over_ranks_draws_every_source_in_order(counting_store):
    """Four ranks with separate samplers, one of them resumed, read the samples of one process."""

    def blend() -> BlendedSampler:
        samplers = [
            WindowSampler(counting_store(300 + 70 * n, f"source {n}"), CONTEXT, seed=n) for n in range(3)
        ]
        return BlendedSampler(samplers, [0.5, 0.3, 0.2])

    def drawn(sampler: BlendedSampler, sample: int) -> tuple[str, int]:
        window = sampler.window(sample)
        return window.source, window.position

    one, ranks = blend(), [blend() for _ in range(4)]
    expected = [drawn(one, sample) for sample in range(400)]
    found = {sample: drawn(ranks[sample % 4], sample) for sample in range(200)}
    ranks[2] = blend()
    found |= {sample: drawn(ranks[sample % 4], sample) for sample in range(399, 199, -1)}
    assert [found[sample] for sample in range(400)] == expected
    for number, share in enumerate((200, 120, 80)):
        own = WindowSampler(counting_store(300 + 70 * number, f"source {number}"), CONTEXT, seed=number)
        given = [position for source, position in expected if source == f"source {number}"]
        assert given == _positions(own, range(share))


def test_blend_far_into_training(counting_store):
    samplers = [WindowSampler(counting_store(400, name), CONTEXT, seed=1) for name in ("a", "b")]
    blend = BlendedSampler(samplers, [0.65, 0.35])
    fresh = BlendedSampler(samplers, [0.65, 0.35])
    start = 20 * 10**9
    sources = [blend.window(sample).source for sample in range(start, start + 20)]
    assert (sources.count("a"), sources.count("b")) == (13, 7)
    first_of_b = start + sources.index("b")
    assert fresh.window(first_of_b).position == samplers[1].window(7 * 10**9).position


@pytest.mark.parametrize("proportions", [[0.5, 0.4], [1.5, -0.5], [0.123456, 0.7654321, 0.1111119]])
def test_proportions_that_do_not_come_out(counting_store, proportions):
    sampler = WindowSampler(counting_store(400, "a"), CONTEXT, seed=1)
    with pytest.raises(ValueError, match="must not be negative and must sum to 1; round them"):
        BlendedSampler([sampler] * len(proportions), proportions)


@pytest.mark.parametrize(("sources", "proportions"), [(0, []), (2, [1.0])])
def test_one_proportion_per_source(counting_store, sources, proportions):
    sampler = WindowSampler(counting_store(400, "a"), CONTEXT, seed=1)
    with pytest.raises(ValueError, match="give each source exactly one"):
        BlendedSampler([sampler] * sources, proportions)
