"""The sequences of a split, read from its shards in any order."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from megaconsa.data.cache_settings import DEFAULT_CACHE, CacheSettings
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.order import GlobalShuffle, Order, ShardShuffle, WindowShuffle
from megaconsa.data.shards import Shard, open_split
from megaconsa.errors import InputError


class TokenShards(Dataset[np.ndarray]):
    """Random access to the packed sequences of one split."""

    def __init__(self, path: Path, split: str, cache: CacheSettings = DEFAULT_CACHE) -> None:
        """Opens a split.

        path: the data folder.
        cache: for a folder in an object store.

        Raises InputError, naming the file, where a shard is missing. A shard with another size than
        the index says is found when it is opened.
        """
        self.info = DatasetInfo.load(path, cache)
        self._split = open_split(Path(path), self.info, split, cache)
        self._check_presence()
        self._loaded: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return int(self._split.sizes.sum())

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of a sequence, (S + 1,).

        Raises DataError, naming the file, where its shard is damaged.
        """
        return self.rows(np.array([index]))[0]

    def locate(self, index: int) -> tuple[Path, int]:
        """The file that holds a sequence, and the sequence's row in it, from 0."""
        number = self._number(index)
        return self._split.path(number), index - int(self._split.begins[number])

    def shard_bytes(self, index: int) -> int:
        """Bytes of the shard that holds a sequence, if it is in an object store, or 0."""
        return self._split.shard_bytes(self._number(index))

    def fetch_ahead(self, index: int) -> None:
        """Downloads the shard that holds a sequence, as Split.fetch_ahead does."""
        self._split.fetch_ahead(self._number(index))

    def rows(self, ids: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
        """The ids of several sequences.

        ids: (B,) indices of the sequences.
        masks: gets their masks, (B, S + 1) uint8: 0 where a token is not to be predicted.

        Returns (B, S + 1) in the stored type. Raises as `__getitem__` does.
        """
        numbers = self._split.ends.searchsorted(ids, side="right")
        places = ids - self._split.begins[numbers]
        rows = np.empty((len(ids), self.info.sequence_length + 1), self._split.id_type)
        if self.info.loss_mask:
            # A row's hash covers its mask, so it is read in any case.
            found = np.empty(rows.shape, np.uint8) if masks is None else masks
            for row, mask, number, place in zip(rows, found, numbers, places, strict=True):
                self._shard(int(number)).read(int(place), row, mask)
            return rows
        if masks is not None:
            masks[:] = 1
        for row, number, place in zip(rows, numbers.tolist(), places.tolist(), strict=True):
            self._shard(number).read(place, row)
        return rows

    def order(self, seed: int, shuffle_shards: int = 0) -> Order:
        """The shuffled order of its sequences.

        shuffle_shards: number of shards whose sequences are mixed with each other. 0 mixes all.

        Raises InputError where the folder is of version 1, which mixes in one way only.
        """
        if self.info.compressed:
            if shuffle_shards:
                raise InputError(
                    f"data.shuffle_shards={shuffle_shards}: {self._split.folder.parent} is a "
                    "folder of version 1, which has an order of its own; leave the field out"
                )
            return ShardShuffle(self._split.sizes, seed)
        if shuffle_shards:
            return WindowShuffle(self._split.sizes, seed, shuffle_shards)
        return GlobalShuffle(len(self), seed)

    def sample(self, count: int) -> np.ndarray:
        """The ids, (count,), of sequences for validation.

        They are evenly spaced over the split, so each source of the data has its share. Compressed
        shards give the first ones, so that the runs that began with them stay comparable.
        """
        if self.info.compressed:
            return np.arange(count)
        return np.arange(count) * len(self) // count

    def _number(self, index: int) -> int:
        """The number of the shard that holds a sequence."""
        return int(self._split.ends.searchsorted(index, side="right"))

    def _shard(self, number: int) -> Shard:
        """A shard. It stays loaded until enough others were used after it."""
        shard = self._loaded.get(number)
        if shard is None:
            shard = self._split.shard(number)
            if len(self._loaded) == shard.loaded_at_once:
                # The first entry is the shard that was used least recently.
                _, oldest = self._loaded.popitem(last=False)
                oldest.unload()
            self._loaded[number] = shard
        self._loaded.move_to_end(number)
        return shard

    def _check_presence(self) -> None:
        """Raises InputError, naming the first one, where files are missing."""
        folder = self._split.folder
        try:
            missing = self._split.missing()
        except OSError as error:
            raise InputError(f"{folder}: cannot be listed ({error.strerror})") from error
        if missing:
            more = f", and {len(missing) - 1} more," if len(missing) > 1 else ""
            raise InputError(
                f"{folder / missing[0]}: shard{more} cannot be found, "
                "restore the file or prepare the data again"
            )
