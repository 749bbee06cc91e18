"""The order of an epoch: every sequence once, mixed as a true shuffle mixes, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaconsa.data.compressed_shard import CompressedShard
from megaconsa.data.order import GlobalShuffle, shard_order
from megaconsa.data.permutation import Permutation


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 2**40))
def test_a_permutation_has_every_number_once(size: int, seed: int, epoch: int) -> None:
    found = Permutation(size, seed, epoch)(np.arange(size))
    assert np.array_equal(np.sort(found), np.arange(size))


def test_a_permutation_of_a_trillion_has_no_number_twice() -> None:
    size = 10**12 + 39
    places = np.concatenate([np.arange(100_000), size - 1 - np.arange(100_000)])
    found = Permutation(size, 7)(places)
    assert len(np.unique(found)) == len(places)
    assert found.min() >= 0
    assert found.max() < size


def test_a_permutation_stays_what_it_was() -> None:
    """Runs resume across releases of NumPy only while this holds."""
    assert Permutation(11, 1, 2)(np.arange(11)).tolist() == [10, 5, 1, 9, 6, 7, 4, 0, 2, 3, 8]
    large = Permutation(10**12, 5, 0)(np.arange(3))
    assert large.tolist() == [
        936279262561,
        998270190805,
        428660384566,
    ]


def test_any_part_of_an_epoch_is_a_part_of_the_whole() -> None:
    order = GlobalShuffle(1000, seed=3)
    whole = order.in_epoch(2, np.arange(1000))
    assert np.array_equal(order.in_epoch(2, np.array([999, 5, 5, 17])), whole[[999, 5, 5, 17]])
    assert not np.array_equal(order.in_epoch(3, np.arange(1000)), whole)
    assert not np.array_equal(GlobalShuffle(1000, seed=4).in_epoch(2, np.arange(1000)), whole)


@pytest.mark.parametrize("size", [3_000, 100_003, 2_000_000])
def test_batches_mix_sources_as_a_true_shuffle_does(size: int) -> None:
    """Two sources are stored one after another. The first has a tenth of the sequences.

    In a true shuffle, a batch's number of its sequences is hypergeometric. The spread over all
    batches must be that of a true shuffle too, neither larger nor smaller.
    """
    batch = min(4096, size // 10)
    for seed in range(5):
        order = GlobalShuffle(size, seed).in_epoch(0, np.arange(size // batch * batch))
        counts = (order < size // 10).reshape(-1, batch).sum(axis=1)
        share = (size // 10) / size
        variance = batch * share * (1 - share) * (size - batch) / (size - 1)
        deviations = (counts - batch * share) / np.sqrt(variance)
        assert np.abs(deviations).max() < 4
        # The mean square of n standard deviates, with a standard error of sqrt(2 / n).
        found = float((deviations**2).mean())
        assert abs(found - 1) < 5 * np.sqrt(2 / len(counts))


def test_neighbours_are_not_kept_together() -> None:
    """The distance of neighbours is that of two random places: a third of the size on average."""
    size = 100_000
    order = GlobalShuffle(size, seed=1).in_epoch(0, np.arange(size))
    distances = np.abs(np.diff(order)) / size
    assert abs(distances.mean() - 1 / 3) < 0.005
    assert (distances < 0.01).mean() == pytest.approx(0.02, abs=0.003)


def test_every_number_comes_at_every_place() -> None:
    """Over many seeds, each of five numbers is at each place equally often."""
    found = np.array([Permutation(5, seed)(np.arange(5)) for seed in range(5000)])
    for place in range(5):
        counts = np.bincount(found[:, place], minlength=5)
        # The standard deviation is 28.
        assert np.abs(counts - 1000).max() < 140


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(0, 2**31), st.integers(0, 5)
)
def test_shard_order_is_a_permutation(sizes: list[int], seed: int, epoch: int) -> None:
    order = shard_order(sizes, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(sum(sizes)))
    assert np.array_equal(order, shard_order(sizes, seed, epoch))


def test_shard_order_stays_what_it_was() -> None:
    """Runs resume across releases of NumPy and streaming only while this holds."""
    assert shard_order([4, 3, 4], seed=1, epoch=2).tolist() == [7, 9, 8, 0, 6, 5, 3, 4, 10, 2, 1]


def test_an_epoch_loads_each_shard_once() -> None:
    sizes = [500] * 60 + [77]
    shard_of = np.repeat(np.arange(61), sizes)
    for epoch in range(3):
        held: list[int] = []
        loads = 0
        for number in shard_of[shard_order(sizes, seed=5, epoch=epoch)].tolist():
            if number in held:
                held.remove(number)
            else:
                loads += 1
            held = [*held, number][-CompressedShard.loaded_at_once :]
        assert loads == 61
