"""Shards of rows of equal size, of which any row can be read alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from megaconsa.data.shard_file import HASH, twice
from megaconsa.errors import DataError
from megaconsa.reading import patiently, read_bytes

ROW_HASH = "row_hash"
"""The column that holds a row's hash. Its name sorts before `tokens`, as in the file."""


class FlatRecord(NamedTuple):
    """What the index says about a shard."""

    name: str
    """The name of its file."""
    samples: int
    """Number of rows."""
    size: int
    """Bytes of the file."""
    digest: int
    """Hash of the file."""


class FlatShard:
    """One uncompressed MDS shard.

    The file begins with the number of rows n and n + 1 offsets, all uint32, and a description. The
    rows follow. A row is a hash and S + 1 ids. The hash covers the ids and the row's place in the
    split, so a row in the wrong place is found too.

    Reading writes nothing. Any number of processes can share a folder, even a read-only one.
    """

    loaded_at_once = 64
    """How many shards of a split are open in a process."""

    def __init__(self, folder: Path, record: FlatRecord, first: int, columns: np.dtype) -> None:
        """Describes the shard. Nothing is read.

        folder: holds the file.
        record: what the index says about it.
        first: place of the first row in the split.
        columns: a row's type: ROW_HASH, then the ids.
        """
        self.path = folder / record.name
        self.record = record
        self.first = first
        self.columns = columns
        self._begin = record.size - record.samples * columns.itemsize
        self._file: int | None = None

    def row(self, number: int) -> np.ndarray:
        """The ids of a row, (S + 1,).

        number: counts from the shard's first row.

        Raises DataError, which names the file, where the row is not what was written. Raises
        UnreachableError where the file stays out of reach.
        """
        return twice(lambda: self._row(number))

    def unload(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def verify(self) -> int:
        """Reads the whole file and returns its largest id. Raises as `row` does."""
        return twice(self._largest_id)

    def _largest_id(self) -> int:
        try:
            data = read_bytes(self.path, within=self.path.parent)
        except OSError as error:
            raise DataError(f"{self.path}: shard cannot be read ({error.strerror})") from error
        self._check_size(len(data))
        if xxhash.xxh3_64_intdigest(data) != self.record.digest:
            raise DataError(
                f"{self.path}: shard does not match its {HASH} hash, the file is damaged"
            )
        largest = 0
        for number in range(self.record.samples):
            begin = self._begin + number * self.columns.itemsize
            row = self._checked(data[begin : begin + self.columns.itemsize], number)
            largest = max(largest, int(row.max()))
        return largest

    def _row(self, number: int) -> np.ndarray:
        """The ids of a row."""
        try:
            return self._checked(self._read(number), number)
        except DataError:
            # Another read shall open the file again.
            self.unload()
            raise

    def _read(self, number: int) -> bytes:
        """The bytes of a row."""
        try:
            return patiently(lambda: self._read_once(number), self.path, self.path.parent)
        except OSError as error:
            raise DataError(f"{self.path}: shard cannot be read ({error.strerror})") from error

    def _read_once(self, number: int) -> bytes:
        begin = self._begin + number * self.columns.itemsize
        try:
            if self._file is not None:
                return os.pread(self._file, self.columns.itemsize, begin)
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._file, self.columns.itemsize, begin)
            self._check_size(os.fstat(self._file).st_size)
            return data
        except (OSError, DataError):
            # The open file may be the cause, for example after the server has restarted.
            self.unload()
            raise

    def _check_size(self, found: int) -> None:
        """Raises DataError unless the file has as many bytes as the index says."""
        if found != self.record.size:
            raise DataError(f"{self.path}: shard has {found} bytes instead of {self.record.size}")

    def _checked(self, data: bytes, number: int) -> np.ndarray:
        """The ids of a row. Raises DataError unless they are what was written."""
        if len(data) != self.columns.itemsize:
            raise DataError(f"{self.path}: shard ends before its row {number}, it was truncated")
        (row,) = np.frombuffer(data, self.columns)
        digest, ids = row
        if row_hash(ids, self.first + number) != digest:
            raise DataError(
                f"{self.path}: row {number} does not match its hash, the file is damaged"
            )
        found: np.ndarray = ids
        return found


def row_hash(ids: np.ndarray, place: int) -> int:
    """The hash of a row.

    ids: (S + 1,) in the stored type.
    place: index of the row in its split.
    """
    return xxhash.xxh3_64_intdigest(ids.tobytes(), seed=place)


def row_type(ids: str, column: str, length: int) -> np.dtype:
    """The type of a row.

    ids: type of the ids.
    column: name of their column.
    length: S + 1.
    """
    return np.dtype([(ROW_HASH, "<u8"), (column, np.dtype(ids).newbyteorder("<"), (length,))])
