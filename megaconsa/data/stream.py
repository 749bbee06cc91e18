"""The stream of batches, read from checked shards. Its order depends on seed and step alone.

We use streaming's format, but not its iteration. docs/data.md says why.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megaconsa.data.cache_settings import DEFAULT_CACHE, CacheSettings
from megaconsa.data.dataset_info import TRAIN
from megaconsa.data.order import StoredOrder
from megaconsa.data.packing import IGNORED, document_starts, mask_labels
from megaconsa.data.prefetch import Prefetcher
from megaconsa.data.read_cost import ReadCost
from megaconsa.data.token_mixture import Sequences, open_sequences
from megaconsa.data.worker_process import die_with_parent
from megaconsa.errors import InputError, RunError
from megaconsa.remote_path import with_address


class RowsAndMasks(NamedTuple):
    """The rows of a micro-batch."""

    ids: np.ndarray
    """(B, S + 1) in the stored type."""
    masks: np.ndarray | None
    """(B, S + 1) uint8, 0 where a token is not to be predicted. None: the data have no masks."""


_Item = tuple[RowsAndMasks | RunError, ReadCost]
"""What a reader gives for a micro-batch: its rows or an error, and what it cost."""


def _read(shards: Sequences, ids: np.ndarray) -> RowsAndMasks:
    """Reads rows, with their masks where the data have some.

    ids: (B,) indices in the split.
    """
    if not shards.info.loss_mask:
        return RowsAndMasks(shards.rows(ids), None)
    masks = np.empty((len(ids), shards.info.sequence_length + 1), np.uint8)
    return RowsAndMasks(shards.rows(ids, masks), masks)


class _Rows(Dataset[_Item]):
    """The rows of a micro-batch as one item.

    The rows are NumPy arrays, because tensors would come from a worker through /dev/shm. An error
    is returned as an item too. Raised in a worker, it would arrive wrapped in the worker's
    traceback.
    """

    def __init__(self, shards: Sequences) -> None:
        self.shards = shards

    def __getitem__(self, ids: np.ndarray) -> _Item:
        cost = ReadCost()
        try:
            with cost.timed():
                rows = _read(self.shards, ids)
        except RunError as error:
            return error, cost
        cost.bytes = rows.ids.nbytes
        if rows.masks is not None:
            cost.bytes += rows.masks.nbytes
        return rows, cost


@dataclass
class Batch:
    """One micro-batch."""

    tokens: Tensor
    """(B, S) int64."""
    labels: Tensor
    """(B, S) int64. -100 is not predicted, by the rules of packing or by the data's masks."""
    documents: Tensor
    """(B, S) int32: index in the sequence at which the position's document begins.

    All zeros where documents are not separate.
    """
    sequences: Tensor
    """(B,) int64: index of each sequence within the step's global batch."""


class BatchStream:
    """The micro-batches of one data-parallel rank.

    The stream of sequences is the concatenation of the epochs' orders. Each step takes the next
    global_batch sequences. Sequence g of the step belongs to micro-step m, data rank r and row b:

        g = m * dp_size * micro_batch + r * micro_batch + b
    """

    def __init__(
        self,
        path: Path,
        split: str = TRAIN,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        workers: int = 0,
        separate_documents: bool = True,
        shuffle: bool = True,
        shuffle_shards: int = 0,
        cache: CacheSettings = DEFAULT_CACHE,
        prefetches: bool = True,
    ) -> None:
        """Opens the split.

        path: a data folder or a mixture file.
        global_batch: sequences per step, over all data ranks.
        micro_batch: sequences per micro-batch.
        workers: number of processes that read ahead. With 0, the caller reads.
        separate_documents: whether batches mark the documents of a sequence.
        shuffle: False keeps the stored order.
        shuffle_shards: number of shards whose sequences are mixed with each other. 0 mixes all.
        cache: for data folders in an object store.
        prefetches: whether to download the shards of the next window while one is read.

        Raises InputError for settings that cannot work.
        """
        if micro_batch < 1 or global_batch < 1 or global_batch % (micro_batch * dp_size):
            raise InputError(
                f"global batch {global_batch} is not a multiple of micro batch {micro_batch} "
                f"times {dp_size} data ranks, change one of them"
            )
        if not 0 <= dp_rank < dp_size:
            raise InputError(
                f"data rank {dp_rank} is outside 0..{dp_size - 1}, count data ranks from 0"
            )
        if seed < 0:
            raise InputError(f"seed {seed} is negative, choose 0 or more")
        self.path = with_address(Path(path))
        self.shards = open_sequences(path, split, cache)
        self.info = self.shards.info
        self.seed = seed
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.workers = workers
        self.separate_documents = separate_documents
        if shuffle:
            self.order = self.shards.order(seed, shuffle_shards)
        else:
            self.order = StoredOrder(len(self.shards))
        self.cache = cache
        self.shuffle_shards = shuffle_shards
        self.prefetches = prefetches and shuffle
        self.cost = ReadCost()
        """What it has cost to read the micro-batches that `steps` has taken."""
        self.awaited: np.ndarray | None = None
        """The (B,) places in the stream of the micro-batch that `steps` waits for, or None."""

    def steps(self, taken: int = 0) -> Iterator[list[Batch]]:
        """Each step's micro-batches of this rank, endlessly.

        taken: number of sequences of the stream to skip.

        Raises DataError, naming the file, when a shard is damaged. Raises UnreachableError when a
        shard stays out of reach.
        """
        loader = DataLoader(
            _Rows(self.shards),
            sampler=self._sampler(taken),
            batch_size=None,
            num_workers=self.workers,
            # Named explicitly, because a process may inherit another start method from its parent.
            # Workers that are not forked import torch for 15 seconds.
            multiprocessing_context="fork" if self.workers else None,
            collate_fn=_as_is,
            worker_init_fn=partial(_leave_signals_to_parent, os.getpid()),
            # The loader must not draw from torch's own generator: a resumed run would draw at
            # another time.
            generator=torch.Generator(),
        )
        rows = iter(loader)
        # Workers were forked before it starts its thread.
        prefetcher = self._prefetcher(taken)
        places = self._places(self.global_batch)
        try:
            while True:
                batches = []
                for place in places:
                    self.awaited = taken + place
                    batches.append(self._batch(self._received(next(rows)), place))
                self.awaited = None
                yield batches
                taken += self.global_batch
                if prefetcher is not None:
                    prefetcher.move(taken)
        finally:
            if prefetcher is not None:
                prefetcher.close()
            # Ends the workers now. Where the garbage collector does it, torch waits five seconds
            # for each worker.
            del rows

    def ids(self, places: np.ndarray) -> np.ndarray:
        """The ids in the split of the sequences at some places of the stream, in any shape."""
        return self.order.ids(places)

    def files(self, places: np.ndarray) -> list[Path]:
        """The shards that hold the sequences at some places of the stream, sorted."""
        return sorted({self.shards.locate(int(i))[0] for i in self.ids(places)})

    def fixed_batches(self, count: int, least: int = 1) -> list[Batch]:
        """This rank's micro-batches of a fixed set of sequences, for validation.

        count: number of sequences, or all of them if there are fewer.
        least: minimum number of micro-batches.

        All ranks get the same number of micro-batches. Where the sequences do not divide evenly,
        the last rows repeat a sequence with all labels -100. A token-weighted mean is thus the same
        for every topology. All sequences are read immediately, in this process.
        """
        count = min(count, len(self.shards))
        padded = self.fixed_count(count, least) * self.micro_batch * self.dp_size
        ids = self.shards.sample(count)
        batches = []
        for place in self._places(padded):
            rows = _read(self.shards, ids[np.where(place < count, place, 0)])
            batch = self._batch(rows, place)
            batch.labels[torch.from_numpy(place >= count)] = IGNORED
            batches.append(batch)
        return batches

    def fixed_count(self, count: int, least: int = 1) -> int:
        """Number of micro-batches that `fixed_batches` gives each rank."""
        count = min(count, len(self.shards))
        if count < self.micro_batch:
            raise InputError(
                f"{count} sequences for evaluation are less than one micro batch of "
                f"{self.micro_batch}, use more"
            )
        rounded_up = -(-count // (self.micro_batch * self.dp_size))
        return max(least, rounded_up)

    def _prefetcher(self, taken: int) -> Prefetcher | None:
        """What downloads ahead, or None if there is nothing to download."""
        if not self.prefetches:
            return None
        order = self.shards.order(self.seed, self.shuffle_shards)
        wanted = np.concatenate(order.ahead(taken)).tolist()
        if not any(self.shards.shard_bytes(index) for index in wanted):
            return None
        return Prefetcher(self.shards, order, taken, self.cache.limit)

    def _places(self, sequences: int) -> list[np.ndarray]:
        """The (B,) places of this rank's rows for each micro-step.

        sequences: the number of sequences that the ranks share.
        """
        grid = np.arange(sequences).reshape(-1, self.dp_size, self.micro_batch)
        return list(grid[:, self.dp_rank])

    def _sampler(self, taken: int) -> Iterator[np.ndarray]:
        """The (B,) sequence ids of this rank's micro-batches, endlessly.

        taken: number of sequences of the stream to skip.
        """
        places = np.stack(self._places(self.global_batch))
        while True:
            yield from self.ids(taken + places)
            taken += self.global_batch

    def _received(self, item: _Item) -> RowsAndMasks:
        """The rows of an item. Counts their cost. Raises the error that came in their place."""
        rows, cost = item
        self.cost += cost
        if isinstance(rows, RunError):
            raise type(rows)(str(rows))
        return rows

    def _batch(self, rows: RowsAndMasks, place: np.ndarray) -> Batch:
        """A micro-batch from its rows.

        place: (B,) indices of the rows within the global batch.
        """
        inputs = rows.ids[:, :-1]
        end = self.info.end_of_text
        if self.separate_documents:
            documents = document_starts(inputs, end)
        else:
            documents = np.zeros(inputs.shape, np.int32)
        labels = mask_labels(rows.ids, end, self.separate_documents, rows.masks)
        return Batch(
            tokens=torch.from_numpy(inputs.astype(np.int64)),
            labels=torch.from_numpy(labels),
            documents=torch.from_numpy(documents),
            sequences=torch.from_numpy(place.astype(np.int64)),
        )


def _as_is(item: Any) -> Any:
    """Replaces the loader's collation, which would convert the rows to tensors."""
    return item


def _leave_signals_to_parent(parent: int, worker: int) -> None:
    """Keeps a worker alive when the scheduler or the terminal signals the whole job.

    The trainer responds to such a signal by saving. It needs the batches of the current step for
    that. The parent's own SIGTERM (its clean-up) still ends the worker.
    """
    die_with_parent(parent)
    # A process group for the worker alone. Signals to the trainer's group (Ctrl-C, timeout) do not
    # reach it.
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Blocked, so that the thread can receive it together with its sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_parents_sigterm, daemon=True).start()


def _await_parents_sigterm() -> None:
    """Ends the worker on a SIGTERM from its parent. Ignores a SIGTERM from other processes."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
