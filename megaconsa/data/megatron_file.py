"""Megatron-LM's tokenized documents: NAME.bin holds ids, and NAME.idx says where each document is.

The index begins with a magic number, version 1, a code of the ids' type, and two counts. The length
and the first byte of each sequence follow. Last come the indices of the sequences at which
documents begin, and the number of sequences. A document is one sequence or several.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megaconsa.data.document import Document
from megaconsa.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
"""The first bytes of an index."""
HEADER = np.dtype(
    [("magic", "V9"), ("version", "<u8"), ("type", "u1"), ("sequences", "<u8"), ("bounds", "<u8")]
)
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The codes of integers. The others are of floating-point numbers."""


class MegatronFile:
    """The documents of one pair of files."""

    def __init__(self, path: Path, index: Path) -> None:
        """Reads the index. The ids are mapped into memory.

        path: the file of ids.

        Raises InputError where the index is damaged or none.
        """
        self._path = path
        self._index = index
        content = _mapped(index)
        if len(content) < HEADER.itemsize:
            raise self._damage("it ends within its header")
        header = content[: HEADER.itemsize].view(HEADER)[0]
        if header["magic"].tobytes() != MAGIC or header["version"] != 1:
            raise self._damage("it is no index of Megatron-LM of version 1")
        if int(header["type"]) not in TYPES:
            raise self._damage(f"its type of ids is {header['type']}, which is no type of integers")
        self._type = np.dtype(TYPES[int(header["type"])])
        sequences = int(header["sequences"])
        bounds = int(header["bounds"])
        expected = HEADER.itemsize + 12 * sequences + 8 * bounds
        if len(content) != expected:
            raise self._damage(f"it has {len(content)} bytes instead of {expected}")
        places = HEADER.itemsize + 4 * sequences
        documents = places + 8 * sequences
        self._lengths = content[HEADER.itemsize : places].view("<i4")
        self._places = content[places:documents].view("<i8")
        self._bounds = content[documents:].view("<i8")
        self._check(sequences)
        self._content = _mapped(path)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._bounds) - 1

    def document(self, number: int) -> Document:
        """A document.

        number: counts from 0.

        Raises ValueError where it is not inside the file of ids.
        """
        parts = []
        for sequence in range(int(self._bounds[number]), int(self._bounds[number + 1])):
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

    def _check(self, sequences: int) -> None:
        """Raises InputError unless the documents are all sequences."""
        bounds = self._bounds
        if (
            not len(bounds)
            or bounds[0] != 0
            or bounds[-1] != sequences
            or (np.diff(bounds) < 0).any()
        ):
            raise self._damage(f"its documents are not its {sequences} sequences")

    def _damage(self, fault: str) -> InputError:
        return InputError(
            f"{self._index}: the index is damaged or of another kind ({fault}), "
            "download it again or leave it out"
        )


def _mapped(path: Path) -> np.ndarray:
    """The bytes of a file."""
    # An empty file cannot be mapped.
    if not path.stat().st_size:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, "r").view(np.ndarray)
