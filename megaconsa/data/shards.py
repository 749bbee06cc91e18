"""Data folders: MDS shards of packed sequences, and dataset.json, which describes them.

A folder is written once. Every byte is checked when it is read. The layout is

    dataset.json
    tokenizer/
    train/         index.json and shard.*.mds
    validation/    index.json and shard.*.mds

dataset.json is written last and atomically. A folder without it is unfinished.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from streaming.base.format.mds.writer import MDSWriter

from megaconsa.console import Task
from megaconsa.data import TOKENIZER
from megaconsa.data.cache_settings import DEFAULT_CACHE, CacheSettings
from megaconsa.data.compressed_shard import CompressedShard
from megaconsa.data.dataset_info import INFO, DatasetInfo
from megaconsa.data.fingerprint import same_tokenizer
from megaconsa.data.flat_shard import ROW_HASH, FlatRecord, FlatShard, row_hash, row_type
from megaconsa.data.remote_cache import RemoteFolder, ShardCache, read_description
from megaconsa.data.shard_file import COLUMN, HASH, LOSS_MASK
from megaconsa.errors import DataError, InputError
from megaconsa.files import is_bare_name, parse_json
from megaconsa.reading import patiently
from megaconsa.remote_path import is_remote, with_address

INDEX = "index.json"
SHARD_BYTES = 64 << 20
"""Size of a shard."""


class Shard(Protocol):
    """One file of sequences."""

    loaded_at_once: int

    @property
    def path(self) -> Path: ...

    def read(self, number: int, ids: np.ndarray, mask: np.ndarray | None = None) -> None: ...

    def unload(self) -> None: ...

    def verify(self) -> int: ...


class Split:
    """The shards of a split, in stored order.

    A split may have tens of thousands of shards. So it keeps a small record of each, and makes a
    flat shard when it is asked for.
    """

    def __init__(
        self,
        folder: Path,
        records: Sequence[FlatRecord | CompressedShard],
        columns: np.dtype,
        cache: ShardCache | None = None,
    ) -> None:
        """Describes the split. Nothing is read.

        folder: the folder of the split.
        records: its shards.
        columns: the type of a row of a flat shard.
        cache: holds the shards if `folder` is in an object store.
        """
        self.folder = folder
        self.cache = cache
        self.sizes = np.array([record.samples for record in records], np.int64)
        """Number of sequences in each shard, (shards,)."""
        self.ends = np.cumsum(self.sizes)
        """Number of sequences up to the end of each shard, (shards,)."""
        self.begins = self.ends - self.sizes
        """Number of sequences before each shard, (shards,)."""
        self.id_type = columns[COLUMN].base
        """The type of stored ids."""
        self._records = records
        self._columns = columns

    def __len__(self) -> int:
        """The number of shards."""
        return len(self._records)

    def shard(self, number: int) -> Shard:
        """A shard. A flat one is a new object that has no file open."""
        record = self._records[number]
        if isinstance(record, CompressedShard):
            return record
        first = int(self.begins[number])
        return FlatShard(self.folder, record, first, self._columns, self.cache)

    def path(self, number: int) -> Path:
        """The file of a shard."""
        record = self._records[number]
        return self.folder / record.name

    def shard_bytes(self, number: int) -> int:
        """Bytes of a shard in an object store. 0 for one on a disk."""
        record = self._records[number]
        if self.cache is None or isinstance(record, CompressedShard):
            return 0
        return record.size

    def fetch_ahead(self, number: int) -> None:
        """Downloads a shard that will be needed soon, if it is in an object store.

        Raises OSError, RunError or InputError if that fails.
        """
        record = self._records[number]
        if self.cache is not None and isinstance(record, FlatRecord):
            self.cache.fetch_ahead(record)

    def missing(self) -> list[str]:
        """The names of the shards that have no file, in stored order.

        The folder is listed once, which costs less than reading the index did. The sizes are left
        to the moment when a shard is opened: every rank would ask for those of all shards. Shards
        in an object store are looked for when they are needed.

        Raises OSError where the folder cannot be listed.
        """
        if self.cache is not None:
            return []
        found = set(patiently(lambda: os.listdir(self.folder), self.folder))
        return [record.name for record in self._records if record.name not in found]


def encoding(vocab_size: int, sequence_length: int) -> str:
    """The MDS encoding of a sample of S + 1 ids. Ids have two bytes where the vocabulary fits."""
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    return f"ndarray:{dtype}:{sequence_length + 1}"


def mask_encoding(sequence_length: int) -> str:
    """The MDS encoding of a sample's mask of S + 1 bytes."""
    return f"ndarray:uint8:{sequence_length + 1}"


def open_split(
    folder: Path, info: DatasetInfo, split: str, settings: CacheSettings = DEFAULT_CACHE
) -> Split:
    """The shards of a split. None of them is opened, and their files are not looked at.

    settings: for a folder in an object store.

    Raises InputError where the index is damaged or disagrees with dataset.json. Raises
    UnreachableError where its storage stays away.
    """
    folder = with_address(folder)
    if is_remote(folder) and info.compressed:
        raise InputError(
            f"data {folder}: a folder of version 1 cannot be read from an object store; "
            "prepare it again"
        )
    if split not in info.splits:
        raise InputError(
            f"data {folder}: it has no {split} split, prepare it with --validation-share above 0"
        )
    file = folder / split / INDEX
    columns = {COLUMN: encoding(info.vocab_size, info.sequence_length)}
    if not info.compressed:
        columns[ROW_HASH] = "uint64"
    if info.loss_mask:
        columns[LOSS_MASK] = mask_encoding(info.sequence_length)
    _, dtype, length = columns[COLUMN].split(":")
    row = row_type(dtype, COLUMN, int(length), masked=info.loss_mask)

    def compact(found: dict[str, Any]) -> Any:
        """Replaces the records of shards. The other objects of the file stay as they are."""
        return _record(file.parent, found, info, columns, row) if "raw_data" in found else found

    try:
        content = read_description(folder, f"{split}/{INDEX}", settings)
        records = parse_json(content, compact)["shards"]
        for record in records:
            if record.samples < 1:
                raise ValueError(f"{record.name} is empty")
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}), prepare the data again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: not an index of such MDS shards ({error!r}), prepare the data again"
        ) from error
    samples = sum(record.samples for record in records)
    promised = info.splits[split].sequences
    if samples != promised:
        raise InputError(
            f"{file}: it counts {samples} sequences but {INFO} promises {promised}, "
            "prepare the data again"
        )
    cache = None
    if is_remote(folder):
        largest = max(record.size for record in records)
        cache = ShardCache(RemoteFolder(folder, settings), split, largest)
    return Split(file.parent, records, row, cache)


def _record(
    folder: Path,
    record: dict[str, Any],
    info: DatasetInfo,
    columns: dict[str, str],
    row: np.dtype,
) -> FlatRecord | CompressedShard:
    """The shard that a record of the index describes.

    folder: the folder of the split.
    columns: the encodings that its columns must have.
    row: the type of a row of a flat shard.

    Raises ValueError, KeyError or TypeError where the record is not such a one.
    """
    files = [record["raw_data"], *filter(None, [record["zip_data"]])]
    for part in files:
        # A path could lead out of the folder.
        if not is_bare_name(part["basename"]):
            raise ValueError(f"it names {part['basename']!r}, which is no file of its folder")
        if HASH not in part["hashes"]:
            raise ValueError(f"{part['basename']} has no {HASH} hash")
    name = files[-1]["basename"]
    found = dict(zip(record["column_names"], record["column_encodings"], strict=False))
    if found != columns:
        raise ValueError(f"{name} holds {found} instead of {columns}")
    if info.compressed:
        return CompressedShard.from_json(str(folder.parent), folder.name, record)
    if record["compression"] is not None:
        raise ValueError(f"{name} is compressed")
    raw = record["raw_data"]
    flat = FlatRecord(
        name=name,
        samples=int(record["samples"]),
        size=int(raw["bytes"]),
        digest=int(raw["hashes"][HASH], 16),
    )
    if flat.size < flat.samples * row.itemsize:
        raise ValueError(f"{name} has {flat.size} bytes, too few for {flat.samples} rows")
    return flat


def verify(folder: Path, task: Task | None = None) -> list[str]:
    """Reads the whole data folder and returns its faults.

    task: advances by one per shard.

    Each fault is one sentence that names the file. The list is empty where all is well. Checks each
    shard's presence, size and hashes, the number of sequences, that all ids are below vocab_size,
    and the tokenizer's fingerprint. Raises InputError where the folder is not a data folder.
    """
    from megaconsa.data.tokenizer import Tokenizer
    from megaconsa.data.tokenizer_folder import local_tokenizer

    folder = with_address(folder)
    info = DatasetInfo.load(folder)
    faults = []
    try:
        fingerprint = Tokenizer.load(local_tokenizer(folder)).fingerprint
        if not same_tokenizer(fingerprint, info.tokenizer_fingerprint):
            expected = info.tokenizer_fingerprint
            faults.append(
                f"{folder / TOKENIZER}: tokenizer has fingerprint {fingerprint} "
                f"but the data was made with {expected}"
            )
    except InputError as error:
        faults.append(str(error))
    for split in info.splits:
        try:
            opened = open_split(folder, info, split)
        except InputError as error:
            faults.append(str(error))
            continue
        for number in range(len(opened)):
            shard = opened.shard(number)
            try:
                largest = shard.verify()
                if largest >= info.vocab_size:
                    faults.append(
                        f"{shard.path}: shard holds token id {largest}, "
                        f"vocab_size is {info.vocab_size}"
                    )
            except DataError as error:
                faults.append(str(error))
            if task:
                task.advance()
    return faults


def write_split(
    folder: Path,
    split: str,
    blocks: Iterable[np.ndarray],
    vocab_size: int,
    sequence_length: int,
    *,
    masked: bool = False,
) -> tuple[int, np.ndarray]:
    """Writes the shards of a split.

    blocks: its sequences, (n, S + 1) ids at a time.
    masked: whether the sequences have masks. The blocks are then of packing's `masked_type`.

    Returns the number of sequences, and how often each id follows another in them and is not masked
    out, (vocab_size,) int64.
    """
    columns = {COLUMN: encoding(vocab_size, sequence_length), ROW_HASH: "uint64"}
    if masked:
        columns[LOSS_MASK] = mask_encoding(sequence_length)
    dtype = np.dtype(columns[COLUMN].split(":")[1]).newbyteorder("<")
    counts = np.zeros(vocab_size, np.int64)
    out = str(folder / split)
    place = 0
    with MDSWriter(columns=columns, out=out, hashes=[HASH], size_limit=SHARD_BYTES) as writer:
        for block in blocks:
            # The first token of a sequence follows nothing.
            predicted = block[:, 1:].reshape(-1)
            if masked:
                predicted = predicted[COLUMN][predicted[LOSS_MASK] == 1]
            counts += np.bincount(predicted, minlength=vocab_size)
            for row in _samples(block, dtype, masked=masked):
                digest = row_hash(row[COLUMN], place, row.get(LOSS_MASK))
                writer.write({**row, ROW_HASH: digest})
                place += 1
    return place, counts


def _samples(
    block: np.ndarray, dtype: np.dtype, *, masked: bool
) -> Iterator[dict[str, np.ndarray]]:
    """The columns of each sequence of a block, without gaps.

    dtype: of the stored ids.
    """
    if not masked:
        for ids in block.astype(dtype):
            yield {COLUMN: ids}
        return
    masks = block[LOSS_MASK].astype(np.uint8)
    for ids, mask in zip(block[COLUMN].astype(dtype), masks, strict=True):
        yield {COLUMN: ids, LOSS_MASK: mask}
