"""The documents in a shard of an MDS folder that others wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megaconsa.data.compressed_shard import CompressedShard
from megaconsa.data.document import Document
from megaconsa.data.mds_index import TEXT, document_column, shard_record
from megaconsa.errors import DataError, InputError


class MdsDocuments:
    """The documents of one shard, which is held in memory."""

    def __init__(self, path: Path, index: Path, field: str, usual: str) -> None:
        """Loads the shard.

        path: its file, compressed or not.
        field, usual: which column holds the documents (mds_index.py).

        Raises InputError where the shard is damaged, or holds what cannot be read safely.
        """
        record = shard_record(path, index)
        self._column, encoding = document_column(path, record, field, usual)
        try:
            self._shard = CompressedShard.from_json(str(index.parent), "", record)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{index}: its record of {path.name} is damaged ({error!r}), download it again"
            ) from error
        try:
            self._shard.validate(allow_unsafe_types=False)
        except ValueError as error:
            # Pickle runs code. Every column of a sample is decoded.
            raise InputError(f"{path}: it holds pickled objects, leave it out") from error
        try:
            self._shard.load()
        except DataError as error:
            raise InputError(f"{error}, download it again or leave it out") from error
        self._width = self._bytes_of_an_id() if encoding == "bytes" else 0

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._shard)

    def document(self, number: int) -> Document:
        """A document.

        number: counts from 0.

        Raises ValueError, with what is wrong, where it is neither text nor ids.
        """
        value = self._shard[number][self._column]
        if isinstance(value, str):
            return Document(value)
        return Document(ids=_numbers(value, self._width, self._column))

    def _bytes_of_an_id(self) -> int:
        """How many bytes an id has, where a column of bytes does not say it: 8 or 4.

        If ids have eight, the upper half of each is 0 in all documents, because ids are small.
        """
        for number in range(len(self)):
            value = self._shard[number][self._column]
            if len(value) % 8 or np.frombuffer(value, "<u4")[1::2].any():
                return 4
        return 8


def holds_ids(path: Path, index: Path, field: str, usual: str) -> bool:
    """Whether the documents of a shard are ids. Raises InputError where it has none."""
    return document_column(path, shard_record(path, index), field, usual)[1] != TEXT


def _numbers(value: bytes | np.ndarray, width: int, column: str) -> np.ndarray:
    """The integers that a column holds, (n,) int64.

    width: bytes of each, where the value is bytes.

    Raises ValueError where it holds something else.
    """
    if isinstance(value, bytes):
        if len(value) % width:
            raise ValueError(f'column "{column}" has {len(value)} bytes, not {width} for each id')
        return np.frombuffer(value, f"<i{width}" if width == 8 else "<u4").astype(np.int64)
    if value.ndim != 1 or value.dtype.kind not in "iu":
        raise ValueError(f'column "{column}" is {value.dtype} of shape {value.shape}, not ids')
    return value.astype(np.int64)
