"""Data folders: MDS shards of packed sequences, and dataset.json, which describes them.

A folder is written once. Every byte is checked when it is read. The layout is

    dataset.json
    tokenizer/
    train/         index.json and shard.*.mds.zstd
    validation/    index.json and shard.*.mds.zstd

dataset.json is written last and atomically. A folder without it is unfinished.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from streaming.base.compression import decompress
from streaming.base.format.base.reader import FileInfo
from streaming.base.format.mds.reader import MDSReader
from streaming.base.format.mds.writer import MDSWriter
from streaming.base.hashing import get_hash

from megaconsa.console import Task
from megaconsa.data import TOKENIZER
from megaconsa.data.fingerprint import same_tokenizer
from megaconsa.errors import InputError, RunError
from megaconsa.files import is_bare_name, parse_json
from megaconsa.reading import patiently, read_bytes

logger = logging.getLogger(__name__)

TRAIN = "train"
VALIDATION = "validation"
INFO = "dataset.json"
UNFINISHED = "dataset.json.unfinished"
"""Marks a folder as ours while it is being prepared, and is locked during that time.

It is renamed to dataset.json at the end.
"""
INDEX = "index.json"
COLUMN = "tokens"
HASH = "xxh3_64"
SHARD_BYTES = 8 << 20
"""Decompressed size of a shard. Readers hold several shards in memory, see stream.py."""


class DataError(RunError):
    """Data on disk is not what was written. The message names the file."""


class SplitInfo(BaseModel):
    """What a split holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sequences: int
    tokens: int
    """Predicted tokens: sequences times the sequence length."""
    documents: int
    """Number of packed documents. It includes the document in the dropped tail."""


class SourceInfo(BaseModel):
    """What the data was made from. Equal sources give equal data."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    names: list[str]
    """The sources as they were given."""
    digest: str
    """Hash of all documents in order."""
    documents: int
    bad_documents: int = 0
    """Documents that could not be read and were skipped."""
    characters: int
    validation_share: float
    trained_vocabulary: int | None
    """Vocabulary size of the tokenizer that was trained on this source.

    None where a tokenizer was given.
    """


class DatasetInfo(BaseModel):
    """The content of dataset.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    vocab_size: int
    tokenizer_fingerprint: str
    end_of_text: int
    sequence_length: int
    unigram_entropy: float
    """Entropy of the predicted tokens' frequencies, in nats.

    A model that knows only these frequencies has this loss.
    """
    splits: dict[str, SplitInfo]
    source: SourceInfo

    @classmethod
    def load(cls, folder: Path) -> DatasetInfo:
        """Reads `folder`/dataset.json.

        Raises InputError where the folder is missing, empty, unfinished or not a data folder.
        """
        return patiently(lambda: cls._load(Path(folder)), folder)

    @classmethod
    def _load(cls, folder: Path) -> DatasetInfo:
        if not folder.is_dir():
            raise InputError(
                f"data {folder}: no such folder, make it with `megaconsa prepare-data`"
            )
        file = folder / INFO
        if not file.is_file():
            if (folder / UNFINISHED).exists():
                state = "its preparation did not finish"
            else:
                state = f"it has no {INFO}"
            raise InputError(
                f"data {folder}: {state}, run `megaconsa prepare-data` with --out {folder}"
            )
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(f"{file}: {field}: {first['msg']}, prepare the data again") from error


def encoding(vocab_size: int, sequence_length: int) -> str:
    """The MDS encoding of a sample of S + 1 ids. Ids have two bytes where the vocabulary fits."""
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    return f"ndarray:{dtype}:{sequence_length + 1}"


class Shard(MDSReader):
    """One MDS shard. It is decompressed into memory, never next to the compressed file.

    Nothing is written. Any number of processes can therefore share a folder, even a read-only one.
    """

    _data: bytes | None = None

    @property
    def path(self) -> Path:
        """The file on disk."""
        return Path(self.dirname, self.split, self._stored.basename)

    @property
    def _stored(self) -> FileInfo:
        """The index's record of the file on disk."""
        return self.zip_data or self.raw_data

    def check_file(self) -> str | None:
        """What is wrong with the file, or None. Only its presence and size are checked."""
        try:
            size = patiently(self.path.stat, self.path).st_size
        except OSError as error:
            return f"{self.path}: shard cannot be found ({error.strerror})"
        if size != self._stored.bytes:
            return f"{self.path}: shard has {size} bytes instead of {self._stored.bytes}"
        return None

    def load(self) -> None:
        """Reads, checks and decompresses the file.

        Raises DataError, which names the file, where any of that fails. Raises UnreachableError
        where the file stays out of reach.
        """
        data = self._read()
        try:
            self._check(data, self._stored, "")
        except DataError as error:
            logger.warning("%s; reading it again", error)
            data = self._read()
            self._check(data, self._stored, "")
        if self.compression:
            try:
                data = decompress(self.compression, data)
            except Exception as error:  # each compression library has its own exceptions
                raise DataError(f"{self.path}: shard does not decompress ({error})") from error
            self._check(data, self.raw_data, "decompressed ")
        self._data = data

    def _read(self) -> bytes:
        try:
            return read_bytes(self.path, within=self.path.parent)
        except OSError as error:
            raise DataError(f"{self.path}: shard cannot be read ({error.strerror})") from error

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
        """Raises DataError unless size and hash are as expected.

        what: an adjective of the data for the error message, or "".
        """
        if len(data) != expected.bytes:
            raise DataError(
                f"{self.path}: {what}shard has {len(data)} bytes instead of {expected.bytes}"
            )
        if get_hash(HASH, data) != expected.hashes[HASH]:
            raise DataError(
                f"{self.path}: {what}shard does not match its {HASH} hash, the file is damaged"
            )


def open_split(folder: Path, info: DatasetInfo, split: str) -> list[Shard]:
    """The shards of a split. None of them is loaded.

    Raises InputError where the index is damaged or disagrees with dataset.json.
    """
    if split not in info.splits:
        raise InputError(
            f"data {folder}: it has no {split} split, prepare it with --validation-share above 0"
        )
    file = folder / split / INDEX
    try:
        records: list[dict[str, Any]] = parse_json(read_bytes(file))["shards"]
        shards = [Shard.from_json(str(folder), split, record) for record in records]
        parts = [part for shard in shards for part in (shard.raw_data, shard._stored)]
        for part in parts:
            # A path could lead out of the folder.
            if not is_bare_name(part.basename):
                raise ValueError(f"it names {part.basename!r}, which is no file of its folder")
        complete = all(HASH in part.hashes for part in parts)
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}), prepare the data again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: not an index of MDS shards ({error!r}), prepare the data again"
        ) from error
    if not complete:
        raise InputError(f"{file}: a shard has no {HASH} hash, prepare the data again")
    expected = {COLUMN: encoding(info.vocab_size, info.sequence_length)}
    for shard in shards:
        found = dict(zip(shard.column_names, shard.column_encodings, strict=False))
        if found != expected:
            raise InputError(
                f"{file}: {shard.path.name} holds {found} instead of {expected}, "
                "prepare the data again"
            )
        if shard.samples < 1:
            raise InputError(f"{file}: {shard.path.name} is empty, prepare the data again")
    samples = sum(shard.samples for shard in shards)
    promised = info.splits[split].sequences
    if samples != promised:
        raise InputError(
            f"{file}: it counts {samples} sequences but {INFO} promises {promised}, "
            "prepare the data again"
        )
    return shards


def verify(folder: Path, task: Task | None = None) -> list[str]:
    """Reads the whole data folder and returns its faults.

    task: advances by one per shard.

    Each fault is one sentence that names the file. The list is empty where all is well. Checks each
    shard's presence, size and hashes (as stored and decompressed), the number of sequences, that
    all ids are below vocab_size, and the tokenizer's fingerprint. Raises InputError where the
    folder is not a data folder.
    """
    from megaconsa.data.tokenizer import Tokenizer

    info = DatasetInfo.load(folder)
    faults = []
    try:
        fingerprint = Tokenizer.load(folder / TOKENIZER).fingerprint
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
            shards = open_split(folder, info, split)
        except InputError as error:
            faults.append(str(error))
            continue
        for shard in shards:
            try:
                shard.load()
                largest = max(int(shard[i][COLUMN].max()) for i in range(shard.samples))
                if largest >= info.vocab_size:
                    faults.append(
                        f"{shard.path}: shard holds token id {largest}, "
                        f"vocab_size is {info.vocab_size}"
                    )
            except DataError as error:
                faults.append(str(error))
            finally:
                shard.unload()
            if task:
                task.advance()
    return faults


def write_split(
    folder: Path, split: str, sequences: Iterable[np.ndarray], vocab_size: int, sequence_length: int
) -> np.ndarray:
    """Writes the shards of a split.

    sequences: (S + 1,) ids each.

    Returns how often each id is predicted, (vocab_size,) int64.
    """
    columns = {COLUMN: encoding(vocab_size, sequence_length)}
    dtype = np.dtype(columns[COLUMN].split(":")[1])
    counts = np.zeros(vocab_size, np.int64)
    out = str(folder / split)
    with MDSWriter(
        columns=columns, out=out, compression="zstd", hashes=[HASH], size_limit=SHARD_BYTES
    ) as writer:
        for sequence in sequences:
            writer.write({COLUMN: sequence.astype(dtype)})
            # The first token is not predicted. np.add.at counts ids that occur several times.
            np.add.at(counts, sequence[1:], 1)
    return counts
