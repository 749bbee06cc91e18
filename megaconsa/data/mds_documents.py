"""The documents in a shard of an MDS folder that others wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megaconsa.data.compressed_shard import CompressedShard
from megaconsa.data.document import Document
from megaconsa.data.mds_index import TEXT, document_column, shard_record
from megaconsa.data.packing import IGNORED
from megaconsa.errors import DataError, InputError

LABELS = "labels"
MASKS = ("loss_mask", LABELS)
"""The columns that say which ids are to be predicted. The first one that is there counts."""


class MdsDocuments:
    """The documents of one shard, which is held in memory."""

    def __init__(
        self, path: Path, index: Path, field: str, usual: str, prompt: str | None = None
    ) -> None:
        """Loads the shard.

        path: its file, compressed or not.
        field, usual: which column holds the documents (mds_index.py).
        prompt: the column of the text before a document, if there is one.

        Raises InputError where the shard is damaged, or holds what cannot be read safely.
        """
        record = shard_record(path, index)
        self._column, encoding = document_column(path, record, field, usual)
        self._prompt = prompt
        if prompt is not None:
            _check_prompt(path, record, prompt)
        self._mask = next((name for name in MASKS if name in record["column_names"]), None)
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
        row = self._shard[number]
        value = row[self._column]
        if isinstance(value, str):
            prompt = None if self._prompt is None else row[self._prompt]
            return Document(value, prompt=prompt)
        ids = _numbers(value, self._width, self._column)
        if self._mask is None:
            return Document(ids=ids)
        return Document(ids=ids, mask=_mask(row[self._mask], ids, self._mask))

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


def _check_prompt(path: Path, record: dict[str, Any], prompt: str) -> None:
    """Raises InputError unless the column of prompts is there and holds text."""
    encodings = dict(zip(record["column_names"], record["column_encodings"], strict=True))
    if encodings.get(prompt) != TEXT:
        found = ", ".join(map(ascii, encodings)) or "none"
        raise InputError(
            f'{path}: it has no column "{prompt}" of text, its columns are {found}; '
            "name it with --prompt-field"
        )


def _mask(value: bytes | np.ndarray, ids: np.ndarray, column: str) -> np.ndarray:
    """Which ids are to be predicted, (n,) uint8.

    value: what the column holds: 0 and 1 (`loss_mask`), or each id itself and -100 (`labels`).
    ids: (n,) int64.

    Raises ValueError where it is neither.
    """
    if isinstance(value, bytes) and len(value) == len(ids):
        found = np.frombuffer(value, np.uint8).astype(np.int64)
    else:
        width = len(value) // max(1, len(ids)) if isinstance(value, bytes) else 0
        found = _numbers(value, 8 if width == 8 else 4, column)
    if len(found) != len(ids):
        raise ValueError(f'column "{column}" has {len(found)} values for {len(ids)} ids')
    if column == LABELS:
        # Bytes of four were read without a sign.
        predicted = (found != IGNORED) & (found != IGNORED % 2**32)
        if (found != ids)[predicted].any():
            raise ValueError(f'column "{column}" has other values than the ids and {IGNORED}')
        return predicted.astype(np.uint8)
    if ((found != 0) & (found != 1)).any():
        raise ValueError(f'column "{column}" has other values than 0 and 1')
    return found.astype(np.uint8)


def _numbers(value: bytes | np.ndarray, width: int, column: str) -> np.ndarray:
    """The integers that a column holds, (n,) int64.

    width: bytes of each, where the value is bytes.

    Raises ValueError where it holds something else.
    """
    if isinstance(value, bytes):
        if len(value) % width:
            raise ValueError(f'column "{column}" has {len(value)} bytes, not {width} for each id')
        return np.frombuffer(value, f"<i{width}" if width == 8 else "<u4").astype(np.int64)
    if not isinstance(value, np.ndarray):
        raise ValueError(f'column "{column}" is {type(value).__name__}, not ids')
    if value.ndim != 1 or value.dtype.kind not in "iu":
        raise ValueError(f'column "{column}" is {value.dtype} of shape {value.shape}, not ids')
    return value.astype(np.int64)
