"""Shards that are compressed as a whole, as version 1 of prepare-data wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from streaming.base.compression import decompress
from streaming.base.format.base.reader import FileInfo
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash

from megaconsa.data import source_store
from megaconsa.data.shard_file import COLUMN, twice
from megaconsa.errors import DataError
from megaconsa.remote_path import with_address


class CompressedShard(MDSReader):
    """One compressed MDS shard. It is decompressed into memory, never next to the compressed file.

    Nothing is written. Any number of processes can therefore share a folder, even a read-only one.
    """

    loaded_at_once = 12
    """How many shards of a split a process holds in memory (8 MiB each).

    These are more shards than the shuffle mixes, so an epoch loads each shard once.
    """
    _data: bytes | None = None

    @property
    def path(self) -> Path:
        """The file, on a disk or in an object store."""
        return with_address(Path(self.dirname, self.split, self.name))

    @property
    def name(self) -> str:
        """The name of that file."""
        return str(self._stored.basename)

    @property
    def _stored(self) -> FileInfo:
        """The index's record of the file on disk."""
        return self.zip_data or self.raw_data

    def load(self) -> None:
        """Reads, checks and decompresses the file.

        Raises DataError, which names the file, where any of that fails. Raises UnreachableError
        where the file stays out of reach.
        """
        data = twice(self._read)
        if self.compression:
            try:
                data = decompress(self.compression, data)
            except Exception as error:  # each compression library has its own exceptions
                raise DataError(f"{self.path}: shard does not decompress ({error})") from error
            self._check(data, self.raw_data, "decompressed ")
        self._data = data

    def _read(self) -> bytes:
        """The checked bytes of the file."""
        try:
            data = source_store.read_bytes(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: shard cannot be read ({error.strerror})") from error
        self._check(data, self._stored, "")
        return data

    def read(self, number: int, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Copies a row to `ids`, (S + 1,). Loads the shard before that, and raises as `load`.

        mask: None, because these shards have no masks.
        """
        if self._data is None:
            self.load()
        ids[:] = self[number][COLUMN]

    def verify(self) -> int:
        """Reads the whole file and returns its largest id. Raises as `load` does."""
        try:
            self.load()
            return max(int(self[number][COLUMN].max()) for number in range(self.samples))
        finally:
            self.unload()

    def unload(self) -> None:
        """Frees the memory."""
        self._data = None

    def get_sample_data(self, idx: int) -> bytes:
        """The bytes of a sample of a loaded shard.

        MDSReader would read them from an uncompressed file.
        """
        assert self._data is not None
        # The shard starts with the number of samples, followed by their offsets, in 4 bytes each.
        begin, end = np.frombuffer(self._data, np.uint32, count=2, offset=4 * (1 + idx))
        return self._data[begin:end]

    def _check(self, data: bytes, expected: FileInfo, what: str) -> None:
        """Raises DataError unless size and hashes are as expected.

        what: an adjective of the data for the error message, or "".
        """
        if len(data) != expected.bytes:
            raise DataError(
                f"{self.path}: {what}shard has {len(data)} bytes instead of {expected.bytes}"
            )
        for name, digest in expected.hashes.items():
            if get_hash(name, data) != digest:
                raise DataError(
                    f"{self.path}: {what}shard does not match its {name} hash, the file is damaged"
                )
