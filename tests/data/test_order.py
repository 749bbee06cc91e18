"""The order of an epoch: every sequence once, mixed as a true shuffle mixes, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaconsa.data.compressed_shard import CompressedShard
from megaconsa.data.order import GlobalShuffle, WindowShuffle, shard_order
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


shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(shard_sizes, st.integers(1, 50), st.integers(0, 2**63), st.integers(0, 5))
def test_windows_have_every_sequence_once_and_touch_few_shards(
    sizes: list[int], window: int, seed: int, epoch: int
) -> None:
    total = sum(sizes)
    order = WindowShuffle(np.array(sizes), seed, window)
    found = order.in_epoch(epoch, np.arange(total))
    assert np.array_equal(np.sort(found), np.arange(total))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[found]
    seen: set[int] = set()
    begin = 0
    counts = []
    while begin < total:
        # A window ends where the sequences of its shards do.
        shards: set[int] = set()
        end = begin
        while end == begin or end - begin < sum(sizes[shard] for shard in shards):
            shards.add(int(shard_of[end]))
            end += 1
        counts.append(len(shards))
        assert not shards & seen
        seen |= shards
        begin = end
    assert max(counts) <= window


@settings(max_examples=50, deadline=None)
@given(shard_sizes, st.integers(1, 50), st.integers(0, 5), st.data())
def test_any_part_of_a_windowed_epoch_is_a_part_of_the_whole(
    sizes: list[int], window: int, epoch: int, data: st.DataObject
) -> None:
    total = sum(sizes)
    whole = WindowShuffle(np.array(sizes), 3, window).in_epoch(epoch, np.arange(total))
    places = np.array(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=20)))
    order = WindowShuffle(np.array(sizes), 3, window)
    # Other epochs before it leave nothing behind.
    order.ids(np.array([0, total, 5 * total]))
    assert np.array_equal(order.ids(epoch * total + places), whole[places])


def test_windows_mix_and_differ_between_epochs_and_seeds() -> None:
    sizes = np.full(100, 50)
    first = WindowShuffle(sizes, 1, 10).in_epoch(0, np.arange(5000))
    others = [
        WindowShuffle(sizes, 1, 10).in_epoch(1, np.arange(5000)),
        WindowShuffle(sizes, 2, 10).in_epoch(0, np.arange(5000)),
    ]
    for other in others:
        assert set(first[:500] // 50) != set(other[:500] // 50)
    # The first tenth of a window has sequences of all its shards.
    assert len(set(first[:50] // 50)) == 10


@settings(max_examples=50, deadline=None)
@given(shard_sizes, st.integers(1, 50), st.data())
def test_what_is_ahead_is_what_comes(sizes: list[int], window: int, data: st.DataObject) -> None:
    total = sum(sizes)
    order = WindowShuffle(np.array(sizes), 3, window)
    place = data.draw(st.integers(0, 3 * total))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    now, following = (shard_of[ids].tolist() for ids in order.ahead(place))
    assert max(len(now), len(following)) <= window
    assert shard_of[order.ids(np.array([place]))[0]] in now
    # The window ends at the first place that holds another shard. The next epoch may repeat some.
    epoch_left = total - place % total
    coming = shard_of[order.ids(place + np.arange(epoch_left))]
    outside = np.flatnonzero(~np.isin(coming, now))
    next_place = place + int(outside[0]) if len(outside) else place + epoch_left
    found = shard_of[order.ids(np.array([next_place]))[0]]
    assert found in following


def test_windows_are_about_equal() -> None:
    """A last window of a single shard would bring its sequences one after the other."""
    shard_of = WindowShuffle(np.full(65, 20), 1, 64).in_epoch(0, np.arange(65 * 20)) // 20
    assert len(set(shard_of[-200:].tolist())) > 25


def test_windows_stay_what_they_were() -> None:
    """Runs resume across releases of NumPy only while this holds."""
    order = WindowShuffle(np.array([4, 3, 4, 2, 1]), 1, 2)
    first = [8, 7, 10, 9, 13, 12, 11]
    second = [4, 6, 3, 1, 5, 2, 0]
    assert order.in_epoch(2, np.arange(14)).tolist() == first + second
