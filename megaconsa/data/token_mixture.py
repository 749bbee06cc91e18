"""The sequences of a mixture of data folders, as if they were one split."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from megaconsa.data.cache_settings import DEFAULT_CACHE, CacheSettings
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.mixture import Mixture
from megaconsa.data.mixture_file import MixtureInfo, is_mixture
from megaconsa.data.order import Order
from megaconsa.data.token_shards import TokenShards


class Sequences(Protocol):
    """The packed sequences of a split, of one data folder or of several."""

    info: DatasetInfo

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...

    def rows(self, ids: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray: ...

    def order(self, seed: int, shuffle_shards: int = 0) -> Order: ...

    def sample(self, count: int) -> np.ndarray: ...

    def locate(self, index: int) -> tuple[Path, int]: ...

    def shard_bytes(self, index: int) -> int: ...

    def fetch_ahead(self, index: int) -> None: ...


def open_sequences(path: Path, split: str, cache: CacheSettings = DEFAULT_CACHE) -> Sequences:
    """Opens a split of a data folder or of a mixture.

    cache: for data folders in an object store.

    Raises InputError, naming the file, where something is missing.
    """
    path = Path(path)
    if is_mixture(path):
        return TokenMixture(path, split, cache)
    return TokenShards(path, split, cache)


class TokenMixture:
    """Random access to the sequences of all sources. Their ids follow each other."""

    def __init__(self, file: Path, split: str, cache: CacheSettings = DEFAULT_CACHE) -> None:
        """Opens a split of each data folder.

        file: the mixture file.
        cache: for data folders in an object store.

        Raises InputError, naming the file, where something is missing.
        """
        self._mixture = MixtureInfo(file, cache)
        self.info = self._mixture.combined()
        self._sources: list[TokenShards] = []
        for folder in self._mixture.folders.values():
            self._sources.append(TokenShards(folder, split, cache))
        self._ends = np.cumsum([len(source) for source in self._sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of a sequence, (S + 1,). Raises as `rows` does."""
        return self.rows(np.array([index]))[0]

    def rows(self, ids: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
        """The ids of several sequences.

        ids: (B,) indices of the sequences.
        masks: gets their masks, (B, S + 1) uint8. Those of folders without masks are 1.

        Returns (B, S + 1) in the stored type. Raises DataError, naming the file, where a shard is
        damaged.
        """
        numbers, indices = self._split(ids)
        rows: np.ndarray | None = None
        for number in np.unique(numbers):
            here = numbers == number
            if masks is None:
                found = self._sources[number].rows(indices[here])
            else:
                part = np.empty((int(here.sum()), masks.shape[1]), np.uint8)
                found = self._sources[number].rows(indices[here], part)
                masks[here] = part
            if rows is None:
                rows = np.empty((len(ids), found.shape[1]), found.dtype)
            rows[here] = found
        assert rows is not None
        return rows

    def order(self, seed: int, shuffle_shards: int = 0) -> Order:
        """The stream in which the sources have their weights, each in a shuffled order.

        shuffle_shards: as in TokenShards.order, for each source.
        """
        orders = []
        for name, source in zip(self._mixture.folders, self._sources, strict=True):
            # Sources of one size would be shuffled alike by one seed.
            own_seed = xxhash.xxh3_64_intdigest(name.encode(), seed)
            orders.append(source.order(own_seed, shuffle_shards))
        begins = self._ends - [len(source) for source in self._sources]
        return _MixedOrder(Mixture(self._mixture.phases, seed), orders, begins)

    def sample(self, count: int) -> np.ndarray:
        """The ids, (count,), of sequences that are evenly spaced over all sources."""
        return np.arange(count) * len(self) // count

    def locate(self, index: int) -> tuple[Path, int]:
        """The file that holds a sequence, and the sequence's row in it, from 0."""
        numbers, indices = self._split(np.array([index]))
        return self._sources[numbers[0]].locate(int(indices[0]))

    def shard_bytes(self, index: int) -> int:
        """Bytes of the shard that holds a sequence, if it is in an object store, or 0."""
        numbers, indices = self._split(np.array([index]))
        return self._sources[numbers[0]].shard_bytes(int(indices[0]))

    def fetch_ahead(self, index: int) -> None:
        """Downloads the shard that holds a sequence, as Split.fetch_ahead does."""
        numbers, indices = self._split(np.array([index]))
        self._sources[numbers[0]].fetch_ahead(int(indices[0]))

    def _split(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sequence, (B,), and the sequence's index in it, (B,)."""
        numbers = np.searchsorted(self._ends, ids, side="right")
        begins = np.concatenate([[0], self._ends])
        return numbers, ids - begins[numbers]


class _MixedOrder:
    """The stream of a mixture."""

    def __init__(self, mixture: Mixture, orders: list[Order], begins: np.ndarray) -> None:
        """orders: of each source. begins: the id of the first sequence of each."""
        self._mixture = mixture
        self._orders = orders
        self._begins = begins

    def ids(self, places: np.ndarray) -> np.ndarray:
        numbers, given = self._mixture.locate(places.reshape(-1))
        ids = np.empty_like(given)
        for number in np.unique(numbers):
            here = numbers == number
            ids[here] = self._orders[number].ids(given[here]) + self._begins[number]
        return ids.reshape(places.shape)

    def ahead(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        now = []
        following = []
        counts = self._mixture.counts(place)
        for order, count, begin in zip(self._orders, counts, self._begins, strict=True):
            own, own_following = order.ahead(int(count))
            now.append(own + begin)
            following.append(own_following + begin)
        return np.concatenate(now), np.concatenate(following)
