"""The sequences of a split, read from its shards in any order."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.order import GlobalShuffle, Order, ShardShuffle
from megaconsa.data.shards import open_split
from megaconsa.errors import InputError


class TokenShards(Dataset[np.ndarray]):
    """Random access to the packed sequences of one split."""

    def __init__(self, path: Path, split: str) -> None:
        """Opens a split.

        path: the data folder.

        Raises InputError, naming the file, where a shard is missing or has another size than the
        index says.
        """
        self.info = DatasetInfo.load(path)
        self._shards = open_split(Path(path), self.info, split)
        for shard in self._shards:
            if fault := shard.check_file():
                raise InputError(f"{fault}, restore the file or prepare the data again")
        self.shard_sizes = np.array([shard.samples for shard in self._shards], np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self._loaded: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return int(self.shard_sizes.sum())

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of a sequence, (S + 1,).

        Raises DataError, naming the file, where its shard is damaged.
        """
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        if number not in self._loaded:
            if len(self._loaded) == shard.loaded_at_once:
                # The first entry is the shard that was used least recently.
                oldest, _ = self._loaded.popitem(last=False)
                self._shards[oldest].unload()
            self._loaded[number] = None
        self._loaded.move_to_end(number)
        first = int(self._ends[number]) - shard.samples
        return shard.row(int(index) - first)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The ids of several sequences.

        ids: (B,) indices of the sequences.

        Returns (B, S + 1) in the stored type.
        """
        return np.stack([self[i] for i in ids])

    def order(self, seed: int) -> Order:
        """The shuffled order of its sequences."""
        if self.info.compressed:
            return ShardShuffle(self.shard_sizes, seed)
        return GlobalShuffle(len(self), seed)

    def sample(self, count: int) -> np.ndarray:
        """The ids, (count,), of sequences for validation.

        They are evenly spaced over the split, so each source of the data has its share. Compressed
        shards give the first ones, so that the runs that began with them stay comparable.
        """
        if self.info.compressed:
            return np.arange(count)
        return np.arange(count) * len(self) // count
