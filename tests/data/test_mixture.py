"""Mixtures: each source's sequences once and in order, in proportions that only chance disturbs."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaconsa.data import mixture
from megaconsa.data.mixture import Mixture, Phase


def shares(weights: list[int]) -> tuple[Fraction, ...]:
    return tuple(Fraction(weight, sum(weights)) for weight in weights)


def phases(begins: list[int], weights: list[list[int]]) -> list[Phase]:
    return [Phase(begin, shares(each)) for begin, each in zip(begins, weights, strict=True)]


WEIGHTS = st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any)


@settings(deadline=None)
@given(
    weights=st.lists(WEIGHTS, min_size=1, max_size=4),
    gaps=st.lists(st.integers(1, 300), min_size=3, max_size=3),
    block=st.integers(1, 100),
    seed=st.integers(0, 5),
)
def test_each_source_gives_its_sequences_once_and_without_gaps(
    weights: list[list[int]], gaps: list[int], block: int, seed: int
) -> None:
    begins = np.cumsum([0, *gaps])[: len(weights)].tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "BLOCK", block)
        mixed = Mixture(phases(begins, weights), seed)
        size = begins[-1] + 5 * block
        places = np.arange(size)
        sources, given_before = mixed.locate(places)
        counts = mixed.counts(size)
        assert counts.sum() == size
        for source in range(3):
            found = given_before[sources == source]
            assert np.array_equal(found, np.arange(counts[source]))
            if all(each[source] == 0 for each in weights):
                assert not len(found)
        # Any part of the stream can be looked up alone, in any order.
        chosen = np.random.default_rng(seed).permutation(size)[: size // 2]
        some, some_given = mixed.locate(chosen)
        assert np.array_equal(some, sources[chosen])
        assert np.array_equal(some_given, given_before[chosen])


def test_proportions_are_exact_but_for_chance() -> None:
    """Batches of 4096 against the hypergeometric law of a block."""
    weights = [[70, 20, 9, 1], [10, 20, 30, 40]]
    begins = [0, 3 * 4096 * 64]
    mixed = Mixture(phases(begins, weights), seed=3)
    size = 4096
    for phase in range(2):
        batches = np.arange(begins[phase], begins[phase] + 2 * begins[1], size)
        if phase == 0:
            batches = batches[batches < begins[1]]
        found = np.zeros((len(batches), 4))
        for row, first in zip(found, batches, strict=True):
            sources, _ = mixed.locate(np.arange(first, first + size))
            row[:] = np.bincount(sources, minlength=4)
        share = np.array(weights[phase]) / sum(weights[phase])
        sample = 1 - (size - 1) / (mixture.BLOCK - 1)
        deviation = np.sqrt(size * share * (1 - share) * sample)
        scores = (found - size * share) / deviation
        assert np.abs(scores).max() < 4
        assert 0.75 < scores.std() < 1.25


def test_counts_are_those_of_the_weights() -> None:
    mixed = Mixture(phases([0, 1000], [[1, 2], [1, 0]]), seed=0)
    assert mixed.counts(999).tolist() == [333, 666]
    assert mixed.counts(1000).tolist() == [333, 667]
    assert mixed.counts(3000).tolist() == [2333, 667]


def test_order_is_pinned() -> None:
    """A change of this order would change every run that is under way."""
    mixed = Mixture(phases([0, 100_000], [[3, 1], [1, 1]]), seed=7)
    places = np.array([0, 1, 2, 65_535, 65_536, 99_999, 100_000, 10**12])
    sources, before = mixed.locate(places)
    assert sources.tolist() == [0, 1, 0, 0, 1, 0, 1, 1]
    assert before.tolist() == [0, 0, 1, 49151, 16384, 74999, 25000, 499999974903]
