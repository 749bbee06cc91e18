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
