"""In which order the sequences of a split come. It depends on the seed alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from streaming.base.shuffle import get_shuffle

from megaconsa.data.permutation import Permutation

SHUFFLE_SHARDS = 8
"""The shuffle of compressed shards mixes the sequences of about this many shards at any time."""


class Order(Protocol):
    """The endless stream of a split's sequences."""

    def ids(self, places: np.ndarray) -> np.ndarray:
        """The ids of the sequences at some places of the stream, in any shape."""
        ...

    def ahead(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """What to download from a place of the stream on.

        Returns the ids of one sequence of each shard of the window at the place, and of each shard
        of the next window. Both are (shards,) int64, and empty where the order has no windows.
        """
        ...


class EpochOrder(ABC):
    """A stream that is one epoch after the other. Each epoch has every sequence once."""

    def __init__(self, size: int) -> None:
        """size: number of sequences."""
        self.size = size

    def ids(self, places: np.ndarray) -> np.ndarray:
        epochs, offsets = np.divmod(places, self.size)
        ids = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            ids[now] = self.in_epoch(int(epoch), offsets[now])
        return ids

    def ahead(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        none = np.empty(0, np.int64)
        return none, none

    @abstractmethod
    def in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The ids, (B,), of the sequences at some places, (B,), of an epoch."""


class StoredOrder(EpochOrder):
    """As stored, in every epoch."""

    def in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        return places


class GlobalShuffle(EpochOrder):
    """Any sequence may come at any place. Nothing is held in memory."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size)
        self.seed = seed

    def in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        return Permutation(self.size, self.seed, epoch)(places)


class WindowShuffle(EpochOrder):
    """Mixes the sequences of a window of shards at a time. Windows follow each other.

    Each epoch puts the shards into another order and cuts it into windows. It suits shards that
    have to be downloaded: only those of one or two windows are needed at any time. It holds some
    numbers for each shard, and none for each sequence.
    """

    def __init__(self, shard_sizes: np.ndarray, seed: int, window: int) -> None:
        """Makes the order.

        shard_sizes: number of sequences in each shard, (shards,).
        window: largest number of shards in a window, at least 1. Windows differ by one at most.
        """
        super().__init__(int(shard_sizes.sum()))
        self.shard_sizes = shard_sizes
        self.seed = seed
        self.window = window
        self._begins = np.cumsum(shard_sizes) - shard_sizes
        self._epochs: dict[int, _Windows] = {}

    def in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        windows = self._windows(epoch)
        numbers = windows.ends.searchsorted(places, side="right")
        mixed = np.empty_like(places)
        for number in np.unique(numbers):
            here = numbers == number
            begin = windows.begins[number]
            size = int(windows.ends[number] - begin)
            # The key with a 0 in place of the window's number is that of the shards.
            permutation = Permutation(size, self.seed, epoch, int(number) + 1)
            mixed[here] = begin + permutation(places[here] - begin)
        ranks = windows.shard_ends.searchsorted(mixed, side="right")
        shards = windows.shards[ranks]
        return mixed - windows.shard_begins[ranks] + self._begins[shards]

    def ahead(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, offset = divmod(place, self.size)
        windows = self._windows(epoch)
        number = int(windows.ends.searchsorted(offset, side="right"))
        now = windows.shards_of(number)
        if number + 1 < len(windows.ends):
            following = windows.shards_of(number + 1)
        else:
            following = self._windows(epoch + 1).shards_of(0)
        return self._begins[now], self._begins[following]

    def _windows(self, epoch: int) -> _Windows:
        """The windows of an epoch."""
        if epoch not in self._epochs:
            # Keep the previous epoch: a step needs two epochs where one ends and the next begins.
            self._epochs = {e: kept for e, kept in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = _Windows(self.shard_sizes, self.seed, epoch, self.window)
        return self._epochs[epoch]


class _Windows:
    """The shards of an epoch in the order of WindowShuffle, and how they are cut into windows."""

    def __init__(self, shard_sizes: np.ndarray, seed: int, epoch: int, window: int) -> None:
        count = len(shard_sizes)
        self.shards = Permutation(count, seed, epoch, 0)(np.arange(count))
        """The shards in the order of the epoch, (shards,)."""
        sizes = shard_sizes[self.shards]
        self.shard_ends = np.cumsum(sizes)
        """Number of sequences up to the end of each of them, (shards,)."""
        self.shard_begins = self.shard_ends - sizes
        """Number of sequences before each of them, (shards,)."""
        windows = -(-count // window)
        # A last window of few shards would mix little, so all windows are about equal.
        self.bounds = np.arange(windows + 1) * count // windows
        """Number of shards before each window, and the number of all, (windows + 1,)."""
        self.begins = self.shard_begins[self.bounds[:-1]]
        """Number of sequences before each window, (windows,)."""
        self.ends = self.shard_ends[self.bounds[1:] - 1]
        """Number of sequences up to the end of each window, (windows,)."""

    def shards_of(self, number: int) -> np.ndarray:
        """The shards of a window, (shards,)."""
        return self.shards[self.bounds[number] : self.bounds[number + 1]]


class ShardShuffle(EpochOrder):
    """Mixes the sequences of a few shards at a time, so that each shard is read once per epoch.

    Compressed shards need it, because a shard is read as a whole.
    """

    def __init__(self, shard_sizes: np.ndarray, seed: int) -> None:
        """Makes the order.

        shard_sizes: number of sequences in each shard.
        """
        super().__init__(int(shard_sizes.sum()))
        self.shard_sizes = shard_sizes
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if epoch not in self._orders:
            # Keep the previous epoch: a step needs two epochs where one ends and the next begins.
            # It needs more only if the split is smaller than the step.
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = shard_order(self.shard_sizes, self.seed, epoch)
        return self._orders[epoch][places]


def shard_order(shard_sizes: Sequence[int] | np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The sequence ids of an epoch in the order of ShardShuffle.

    shard_sizes: number of sequences in each shard.

    Returns (N,) int64. Each id occurs once. Shards are shuffled first. Then their sequences are
    mixed with those of neighbouring shards (streaming's py1e).
    """
    sizes = np.array(shard_sizes, np.int64)
    return get_shuffle(
        "py1e",
        sizes,
        num_canonical_nodes=1,
        seed=seed,
        epoch=epoch,
        block_size=SHUFFLE_SHARDS * int(sizes.max()),
    )
