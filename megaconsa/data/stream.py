"""Batches in an order that is a function of seed and step alone, read from checked shards.

streaming's format and shuffle are used, its iteration is not: docs/data.md says why.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming.base.shuffle import get_shuffle
from streaming.base.spanner import Spanner
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megaconsa.data.packing import IGNORED, document_starts, mask_labels
from megaconsa.data.shards import COLUMN, TRAIN, DatasetInfo, open_split
from megaconsa.errors import InputError, RunError

SHUFFLE_SHARDS = 8
"""Sequences of about this many shards are mixed with one another at any time."""
LOADED_SHARDS = 12
"""Shards that a process holds in memory (8 MiB each). More than the shuffle mixes, so that an epoch loads each shard once."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2): the signal that a process gets when its parent dies."""


class TokenShards(Dataset[np.ndarray]):
    """Random access to the packed sequences of one split."""

    def __init__(self, path: Path, split: str) -> None:
        """Opens a split; InputError, naming the file, where a shard is missing or has another size than the index says."""
        self.info = DatasetInfo.load(path)
        self._shards = open_split(Path(path), self.info, split)
        for shard in self._shards:
            if fault := shard.check_file():
                raise InputError(f"{fault}, restore the file or prepare the data again")
        self.shard_sizes = np.array([shard.samples for shard in self._shards], np.int64)
        self._spanner = Spanner(self.shard_sizes)
        self._loaded: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return int(self.shard_sizes.sum())

    def __getitem__(self, index: int) -> np.ndarray:
        """(S + 1,) ids of a sequence; DataError, naming the file, where its shard is damaged."""
        number, offset = self._spanner[int(index)]
        shard = self._shards[number]
        if number not in self._loaded:
            shard.load()
            if len(self._loaded) == LOADED_SHARDS:
                self._shards[self._loaded.popitem(last=False)[0]].unload()
            self._loaded[number] = None
        self._loaded.move_to_end(number)
        tokens: np.ndarray = shard[offset][COLUMN]
        return tokens

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """(B,) indices to (B, S + 1) ids, of the type they are stored in."""
        return np.stack([self[i] for i in ids])


class _Rows(Dataset[np.ndarray | RunError]):
    """The rows of a micro-batch as one item. NumPy, for tensors would cross from a worker through /dev/shm.

    An error is handed over as an item too: raised in a worker it would come wrapped in the worker's traceback.
    """

    def __init__(self, shards: TokenShards) -> None:
        self.shards = shards

    def __getitem__(self, ids: np.ndarray) -> np.ndarray | RunError:
        try:
            return self.shards.rows(ids)
        except RunError as error:
            return error


@dataclass
class Batch:
    """One micro-batch."""

    tokens: Tensor
    """(B, S) int64"""
    labels: Tensor
    """(B, S) int64; -100 is not predicted"""
    documents: Tensor
    """(B, S) int32: index in the sequence at which the position's document begins; zeros where documents are not separate"""
    sequences: Tensor
    """(B,) int64: index of each sequence within the step's global batch"""


def epoch_order(shard_sizes: Sequence[int] | np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The sequence ids of an epoch in order, (N,) int64: a function of the arguments alone, each id once.

    Shards are shuffled, then their sequences are mixed with those of neighbouring shards (streaming's py1e).
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


class BatchStream:
    """The micro-batches of one data-parallel rank.

    The stream of sequences is the concatenation of the epochs' orders; each step takes the next global_batch of it. Sequence g of
    them belongs to micro-step m, data rank r and row b with
    g = m * data_ranks * micro_batch + r * micro_batch + b.
    """

    def __init__(
        self,
        path: Path,
        split: str = TRAIN,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        workers: int = 0,
        separate_documents: bool = True,
        shuffle: bool = True,
    ) -> None:
        """Opens the split. `workers` processes read ahead; with 0 the caller reads. InputError for what cannot work."""
        if micro_batch < 1 or global_batch < 1 or global_batch % (micro_batch * data_ranks):
            raise InputError(
                f"global batch {global_batch} is not a multiple of micro batch {micro_batch} times {data_ranks} data ranks, "
                "change one of them"
            )
        if not 0 <= data_rank < data_ranks:
            raise InputError(
                f"data rank {data_rank} is outside 0..{data_ranks - 1}, count data ranks from 0"
            )
        if seed < 0:
            raise InputError(f"seed {seed} is negative, choose 0 or more")
        self.shards = TokenShards(path, split)
        self.info = self.shards.info
        self.seed, self.global_batch, self.micro_batch = seed, global_batch, micro_batch
        self.data_rank, self.data_ranks, self.workers = data_rank, data_ranks, workers
        self.separate_documents, self.shuffle = separate_documents, shuffle
        self._orders: dict[int, np.ndarray] = {}

    def steps(self, taken: int = 0) -> Iterator[list[Batch]]:
        """Each step's micro-batches of this rank, endlessly, from the place after `taken` sequences of the stream.

        Raises DataError, naming the file, when a shard turns out damaged, and UnreachableError when it
        stays out of reach.
        """
        # With a generator of its own, the loader draws nothing from torch's: a resumed run would draw at another time.
        loader = DataLoader(
            _Rows(self.shards),
            sampler=self._sampler(taken),
            batch_size=None,
            num_workers=self.workers,
            # Named, because a process inherits another way from the one that started it. Workers
            # that start afresh import torch for 15 seconds.
            multiprocessing_context="fork" if self.workers else None,
            collate_fn=_as_is,
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),
        )
        rows = iter(loader)
        places = self._places(self.global_batch)
        try:
            while True:
                yield [self._batch(_sound(next(rows)), place) for place in places]
        finally:
            del rows  # ends the workers now: left to the garbage collector, torch waits five seconds for each

    def fixed_batches(self, count: int, least: int = 1) -> list[Batch]:
        """This rank's micro-batches of the first `count` sequences in stored order, or of all if there are fewer.

        All ranks get equally many, `least` or more. Where the number does not divide, the last rows repeat a sequence with all labels
        -100, so that a token-weighted mean is the same for every topology. Read at once, in this process: for validation.
        """
        count = min(count, len(self.shards))
        batches = []
        for place in self._places(
            self.fixed_count(count, least) * self.micro_batch * self.data_ranks
        ):
            batch = self._batch(self.shards.rows(np.where(place < count, place, 0)), place)
            batch.labels[torch.from_numpy(place >= count)] = IGNORED
            batches.append(batch)
        return batches

    def fixed_count(self, count: int, least: int = 1) -> int:
        """How many micro-batches `fixed_batches` gives each rank."""
        count = min(count, len(self.shards))
        if count < self.micro_batch:
            raise InputError(
                f"{count} sequences for evaluation are less than one micro batch of {self.micro_batch}, use more"
            )
        return max(least, -(-count // (self.micro_batch * self.data_ranks)))

    def _places(self, sequences: int) -> list[np.ndarray]:
        """For each micro-step the (B,) places of this rank's rows among so many sequences."""
        grid = np.arange(sequences).reshape(-1, self.data_ranks, self.micro_batch)
        return list(grid[:, self.data_rank])

    def _sampler(self, taken: int) -> Iterator[np.ndarray]:
        """The (B,) sequence ids of this rank's micro-batches after `taken` sequences of the stream."""
        places = self._places(self.global_batch)
        while True:
            for place in places:
                epochs, offsets = np.divmod(taken + place, len(self.shards))
                yield np.array(
                    [self._order(int(e))[o] for e, o in zip(epochs, offsets, strict=True)]
                )
            taken += self.global_batch

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # A step needs two epochs where one ends and the next begins (more only if the split is smaller than the step).
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            sizes = self.shards.shard_sizes
            self._orders[epoch] = (
                epoch_order(sizes, self.seed, epoch) if self.shuffle else np.arange(sizes.sum())
            )
        return self._orders[epoch]

    def _batch(self, rows: np.ndarray, place: np.ndarray) -> Batch:
        """(B, S + 1) ids as a micro-batch."""
        tokens = torch.from_numpy(rows.astype(np.int64))
        inputs = tokens[:, :-1].contiguous()
        end = self.info.end_of_text
        documents = (
            document_starts(inputs, end)
            if self.separate_documents
            else torch.zeros_like(inputs, dtype=torch.int32)
        )
        return Batch(
            inputs,
            mask_labels(tokens, end, self.separate_documents),
            documents,
            torch.from_numpy(place.astype(np.int64)),
        )


def _sound(rows: np.ndarray | RunError) -> np.ndarray:
    if isinstance(rows, RunError):
        raise type(rows)(str(rows))
    return rows


def _as_is(rows: Any) -> Any:
    """In place of the loader's own collation, which would make tensors of the rows."""
    return rows


def _leave_signals_to_parent(worker: int) -> None:
    """Keeps a worker alive when the scheduler or the terminal signals the whole job.

    The trainer answers such a signal by saving, for which it needs the batches of the step it is in. The parent's own SIGTERM
    (its clean-up) still ends the worker.
    """
    if sys.platform == "linux":
        # Blocked on a full pipe it would not notice that a killed parent is gone.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(1)
    os.setpgid(
        0, 0
    )  # what is sent to the trainer's process group (Ctrl-C, timeout) does not reach it
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_parents_sigterm, daemon=True).start()


def _await_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
