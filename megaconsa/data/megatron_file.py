"""Megatron-LM's tokenized documents: NAME.bin holds ids, and NAME.idx says where each document is.

The index begins with a magic number, version 1, a code of the ids' type, and two counts. The length
and the first byte of each sequence follow. Last come the indices of the sequences at which
documents begin, and the number of sequences. A document is one sequence or several.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megaconsa.data import source_store
from megaconsa.data.document import Document
from megaconsa.errors import InputError
from megaconsa.remote_path import RemotePath

MAGIC = b"MMIDIDX\x00\x00"
"""The first bytes of an index."""
HEADER = np.dtype(
    [("magic", "V9"), ("version", "<u8"), ("type", "u1"), ("sequences", "<u8"), ("bounds", "<u8")]
)
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The codes of integers. The others are of floating-point numbers."""


class MegatronFile:
    """The documents of one pair of files."""

    def __init__(self, path: Path, index: Path, begin: int = 0, end: int | None = None) -> None:
        """Reads the index of all documents, or of those from `begin` up to `end`.

        path: the file of ids.

        Raises InputError where the index is damaged or none.
        """
        self._index = index
        self._content = _content(path)
        described = _content(index)
        if len(described) < HEADER.itemsize:
            raise self._damage("it ends within its header")
        header = described[: HEADER.itemsize].view(HEADER)[0]
        if header["magic"].tobytes() != MAGIC or header["version"] != 1:
            raise self._damage("it is no index of Megatron-LM of version 1")
        if int(header["type"]) not in TYPES:
            raise self._damage(f"its type of ids is {header['type']}, which is no type of integers")
        self._type = np.dtype(TYPES[int(header["type"])])
        sequences = int(header["sequences"])
        bounds = int(header["bounds"])
        expected = HEADER.itemsize + 12 * sequences + 8 * bounds
        if len(described) != expected:
            raise self._damage(f"it has {len(described)} bytes instead of {expected}")
        self._documents = bounds - 1
        self._begin = begin
        stop = bounds if end is None else end + 1
        after = HEADER.itemsize + 12 * sequences
        self._bounds = described[after + 8 * begin : after + 8 * stop].view("<i8")
        self._check(sequences, is_whole=begin == 0 and end is None)
        self._first = int(self._bounds[0])
        last = int(self._bounds[-1])
        lengths = HEADER.itemsize
        self._lengths = described[lengths + 4 * self._first : lengths + 4 * last].view("<i4")
        places = lengths + 4 * sequences
        self._places = described[places + 8 * self._first : places + 8 * last].view("<i8")

    def __len__(self) -> int:
        """The number of documents in the file."""
        return self._documents

    def document(self, number: int) -> Document:
        """A document.

        number: counts from 0, the first document of the file.

        Raises ValueError where it is not inside the file of ids.
        """
        parts = []
        first, last = self._bounds[number - self._begin :][:2] - self._first
        for sequence in range(first, last):
            begin = int(self._places[sequence])
            end = begin + int(self._lengths[sequence]) * self._type.itemsize
            if not 0 <= begin <= end <= len(self._content):
                raise ValueError(
                    f"bytes {begin} to {end} are not in the file of {len(self._content)} bytes, "
                    "download it again or leave it out"
                )
            parts.append(self._content[begin:end].view(self._type))
        ids = np.concatenate(parts) if parts else np.empty(0)
        return Document(ids=ids.astype(np.int64))

    def bytes_before(self) -> np.ndarray:
        """The bytes of ids before each document and in all, (documents + 1,) int64."""
        before = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(self._lengths, out=before[1:])
        return before[self._bounds] * self._type.itemsize

    def _check(self, sequences: int, *, is_whole: bool) -> None:
        """Raises InputError unless the documents are sequences, and all of them are all."""
        bounds = self._bounds
        if (
            not len(bounds)
            or (np.diff(bounds) < 0).any()
            or not 0 <= bounds[0] <= bounds[-1] <= sequences
            or (is_whole and (bounds[0] != 0 or bounds[-1] != sequences))
        ):
            raise self._damage(f"its documents are not its {sequences} sequences")

    def _damage(self, fault: str) -> InputError:
        return InputError(
            f"{self._index}: the index is damaged or of another kind ({fault}), "
            "download it again or leave it out"
        )


class _StoredBytes:
    """The bytes of a file in an object store. A slice is read when it is asked for."""

    def __init__(self, path: RemotePath) -> None:
        self._size = source_store.status(path).size
        self._file = source_store.open_file(path)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> np.ndarray:
        begin, end, _ = part.indices(self._size)
        self._file.seek(begin)
        return np.frombuffer(self._file.read(end - begin), np.uint8)


def _content(path: Path) -> np.ndarray | _StoredBytes:
    """The bytes of a file."""
    if isinstance(path, RemotePath):
        return _StoredBytes(path)
    # An empty file cannot be mapped.
    if not path.stat().st_size:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, "r").view(np.ndarray)
