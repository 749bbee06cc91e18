"""Shards of rows of equal size, of which any row can be read alone."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from megaconsa.data.shard_file import HASH, LOSS_MASK, again, twice
from megaconsa.errors import DataError
from megaconsa.reading import patiently

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


class Cache(Protocol):
    """Local copies of shards in an object store."""

    open_at_once: int

    def open(self, record: FlatRecord) -> int: ...

    def discard(self, record: FlatRecord) -> None: ...


class FlatShard:
    """One uncompressed MDS shard.

    The file begins with the number of rows n and n + 1 offsets, all uint32, and a description. The
    rows follow. A row is a hash and S + 1 ids, behind a mask of S + 1 bytes where the folder has
    masks. The hash covers the ids, the mask and the row's place in the split, so a row in the wrong
    place is found too.

    Reading writes nothing. Any number of processes can share a folder, even a read-only one.
    """

    loaded_at_once = 64
    """How many shards of a split are open in a process."""

    def __init__(
        self,
        folder: Path,
        record: FlatRecord,
        first: int,
        columns: np.dtype,
        cache: Cache | None = None,
    ) -> None:
        """Describes the shard. Nothing is read.

        folder: holds the file.
        record: what the index says about it.
        first: place of the first row in the split.
        columns: a row's type (row_type).
        cache: holds the file instead, if `folder` is in an object store.
        """
        if cache is not None:
            self.loaded_at_once = cache.open_at_once
        self._cache = cache
        self.path = folder / record.name
        self.record = record
        self.first = first
        self.columns = columns
        self._row_bytes = columns.itemsize
        self._begin = record.size - record.samples * self._row_bytes
        self._file: int | None = None
        self._digest = memoryview(bytearray(8)).cast("Q")

    def read(self, number: int, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Reads a row.

        number: counts from the shard's first row.
        ids: gets the ids, (S + 1,) of the stored type without gaps.
        mask: gets the mask, (S + 1,) uint8 without gaps. None: the rows have no masks.

        Raises DataError, which names the file, where the row is not what was written. Raises
        UnreachableError where the file stays out of reach.
        """
        # The calls for other attempts come after the first one, which succeeds nearly always. They
        # would take as long as reading a short row.
        try:
            self._read_once(number, ids, mask)
        except DataError as error:
            again(error, self._read, number, ids, mask)
        except OSError:
            twice(self._read, number, ids, mask)

    def unload(self) -> None:
        """Closes the file."""
        if self._file is not None:
            if self._cache is not None:
                # A forked process may have it open too. Closing alone would leave it locked, and
                # the cache could not remove it.
                fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = None

    def verify(self) -> int:
        """Reads the whole file and returns its largest id. Raises as `read` does."""
        return twice(self._largest_id)

    def _largest_id(self) -> int:
        try:
            data = patiently(self._content, self.path, self.path.parent)
        except OSError as error:
            raise DataError(f"{self.path}: shard cannot be read ({error.strerror})") from error
        self._check_size(len(data))
        if xxhash.xxh3_64_intdigest(data) != self.record.digest:
            raise DataError(
                f"{self.path}: shard does not match its {HASH} hash, the file is damaged"
            )
        rows = np.frombuffer(data, self.columns, offset=self._begin)
        names = self.columns.names or ()
        largest = 0
        for number, row in enumerate(rows):
            ids = row[names[-1]]
            mask = row[LOSS_MASK] if LOSS_MASK in names else None
            if row_hash(ids, self.first + number, mask) != row[ROW_HASH]:
                raise self._damage(number)
            if mask is not None and mask.max() > 1:
                raise DataError(f"{self.path}: the mask of row {number} has other values than 0, 1")
            largest = max(largest, int(ids.max()))
        return largest

    def _read(self, number: int, ids: np.ndarray, mask: np.ndarray | None) -> None:
        """Reads a row, and waits while the file is out of reach."""
        try:
            patiently(lambda: self._read_once(number, ids, mask), self.path, self.path.parent)
        except OSError as error:
            raise DataError(f"{self.path}: shard cannot be read ({error.strerror})") from error

    def _read_once(self, number: int, ids: np.ndarray, mask: np.ndarray | None) -> None:
        """Reads a row. Raises OSError where the system cannot read the file."""
        fresh = self._file is None
        try:
            if self._file is None:
                self._file = self._open()
            begin = self._begin + number * self._row_bytes
            # The ids go to their place without a copy.
            view = ids.data
            buffers = (self._digest, view) if mask is None else (mask.data, self._digest, view)
            count = os.preadv(self._file, buffers, begin)
            if fresh:
                self._check_size(os.fstat(self._file).st_size)
            if count != self._row_bytes:
                raise DataError(f"{self.path}: shard ends before its row {number}")
            # The same as row_hash.
            digest = xxhash.xxh3_64_intdigest(view, self.first + number)
            if mask is not None:
                digest = xxhash.xxh3_64_intdigest(mask.data, digest)
            if digest != self._digest[0]:
                raise self._damage(number)
        except (OSError, DataError) as error:
            # The open file may be the cause, for example after the server has restarted.
            self.unload()
            if self._cache is not None and isinstance(error, DataError):
                self._cache.discard(self.record)
            raise

    def _open(self) -> int:
        """Opens the file. Returns its descriptor."""
        if self._cache is not None:
            return self._cache.open(self.record)
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def _content(self) -> bytes:
        """The whole file."""
        with os.fdopen(self._open(), "rb") as file:
            return file.read()

    def _check_size(self, found: int) -> None:
        """Raises DataError unless the file has as many bytes as the index says."""
        if found != self.record.size:
            raise DataError(f"{self.path}: shard has {found} bytes instead of {self.record.size}")

    def _damage(self, number: int) -> DataError:
        """The error for a row that is not what was written."""
        return DataError(f"{self.path}: row {number} does not match its hash, the file is damaged")


def row_hash(ids: np.ndarray, place: int, mask: np.ndarray | None = None) -> int:
    """The hash of a row.

    ids: (S + 1,) in the stored type, without gaps.
    place: index of the row in its split.
    mask: (S + 1,) uint8 without gaps, if the row has one.
    """
    digest = xxhash.xxh3_64_intdigest(ids.data, seed=place)
    return digest if mask is None else xxhash.xxh3_64_intdigest(mask.data, seed=digest)


def row_type(ids: str, column: str, length: int, *, masked: bool = False) -> np.dtype:
    """The type of a row: its hash and its ids, behind a mask if there is one.

    ids: type of the ids.
    column: name of their column.
    length: S + 1.
    masked: whether the row has a mask.
    """
    mask = [(LOSS_MASK, "u1", (length,))] if masked else []
    dtype = np.dtype(ids).newbyteorder("<")
    return np.dtype([*mask, (ROW_HASH, "<u8"), (column, dtype, (length,))])
