"""dataset.json, which describes a data folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megaconsa.errors import InputError
from megaconsa.reading import patiently

TRAIN = "train"
VALIDATION = "validation"
INFO = "dataset.json"
UNFINISHED = "dataset.json.unfinished"
"""Marks a folder as ours while it is being prepared, and is locked during that time.

It is renamed to dataset.json at the end.
"""


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
    version: Literal[1, 2] = 2
    """1: compressed shards. 2: flat ones, of which any row can be read alone."""
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

    @property
    def compressed(self) -> bool:
        """Whether its shards are compressed."""
        return self.version == 1

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
