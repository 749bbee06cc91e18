"""Which source each sequence of a mixture comes from. It depends on seed and place alone.

The places of the stream are divided into blocks. Each block holds every source in its proportion,
to within a few sequences, and a keyed permutation mixes it. So any block can be made without those
before it, and no batch differs from its proportions by more than chance.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megaconsa.data.permutation import Permutation

BLOCK = 1 << 16
"""Places of a block."""


@dataclass(frozen=True)
class Phase:
    """A part of the stream in which the proportions stay the same."""

    begin: int
    """Its first place. It lasts until the next phase begins."""
    shares: tuple[Fraction, ...]
    """The share of each source. Together they are 1."""

    def counts(self, places: int) -> np.ndarray:
        """How many of the first places of the phase belong to each source, (sources,) int64.

        Exact at the end of a block. No count ever falls when the number of places rises, because
        each source takes its share of what the sources before it leave.
        """
        counts = []
        places_left = places
        share_left = Fraction(1)
        for share in self.shares:
            # The last source takes all that is left. After it, both are 0.
            taken = places_left if share == share_left else int(places_left * share / share_left)
            counts.append(taken)
            places_left -= taken
            share_left -= share
        return np.array(counts, np.int64)


class Mixture:
    """The places of all sources in one endless stream."""

    def __init__(self, phases: Sequence[Phase], seed: int) -> None:
        """phases: in order. The first one begins at 0."""
        self._phases = list(phases)
        self._begins = [phase.begin for phase in phases]
        self._seed = seed
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        """Blocks that were looked up last, by their first places."""
        # Counts of each source at the beginning of each phase.
        self._taken = [np.zeros(len(phases[0].shares), np.int64)]
        for before, phase in zip(self._phases, self._phases[1:], strict=False):
            self._taken.append(self._taken[-1] + before.counts(phase.begin - before.begin))

    def counts(self, places: int) -> np.ndarray:
        """How many of the first places belong to each source, (sources,) int64.

        Between the ends of blocks, chance adds to it or takes from it.
        """
        number = bisect_right(self._begins, places) - 1
        phase = self._phases[number]
        return self._taken[number] + phase.counts(places - phase.begin)

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sources of some places, and what each of them gives there.

        places: (B,) places of the stream.

        Returns the index of each source, (B,), and the number of sequences that it gave before,
        (B,). Both are int64.
        """
        sources = np.empty(len(places), np.int64)
        before = np.empty(len(places), np.int64)
        numbers = np.searchsorted(self._begins, places, side="right") - 1
        begins = np.array(self._begins, np.int64)[numbers]
        firsts = begins + (places - begins) // BLOCK * BLOCK
        for first in np.unique(firsts):
            here = firsts == first
            of_block, before_block = self._block(int(first))
            sources[here] = of_block[places[here] - first]
            before[here] = before_block[places[here] - first]
        return sources, before

    def _block(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for all places of the block that begins at a place."""
        if first not in self._blocks:
            # A step may need two blocks.
            for old in list(self._blocks)[:-1]:
                del self._blocks[old]
            self._blocks[first] = self._mixed_block(first)
        return self._blocks[first]

    def _mixed_block(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        number = bisect_right(self._begins, first) - 1
        phase = self._phases[number]
        size = BLOCK
        if number + 1 < len(self._phases):
            size = min(size, self._begins[number + 1] - first)
        taken = phase.counts(first - phase.begin)
        counts = phase.counts(first - phase.begin + size) - taken
        ends = np.cumsum(counts)
        mixed = Permutation(size, self._seed, first)(np.arange(size))
        sources = np.searchsorted(ends, mixed, side="right")
        # Each source gives its sequences in its own order: one epoch after the other.
        by_source = np.argsort(sources, kind="stable")
        before = np.empty(size, np.int64)
        before[by_source] = np.arange(size)
        return sources, before + (self._taken[number] + taken - (ends - counts))[sources]
