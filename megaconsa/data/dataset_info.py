"""dataset.json, which describes a data folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from megaconsa.data.cache_settings import DEFAULT_CACHE, CacheSettings
from megaconsa.data.remote_cache import read_description
from megaconsa.errors import InputError
from megaconsa.reading import patiently
from megaconsa.remote_path import is_remote, with_address

TRAIN = "train"
VALIDATION = "validation"
INFO = "dataset.json"
UNFINISHED = "dataset.json.unfinished"
"""Marks a folder as ours while it is being prepared, and is locked during that time.

It is renamed to dataset.json at the end.
"""


Packing = Literal["cut", "best-fit"]
"""cut: documents are joined and cut into sequences. best-fit: documents that fit stay whole."""


class SplitInfo(BaseModel):
    """What a split holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sequences: int
    tokens: int
    """Tokens that follow another one in a sequence, without those that fill sequences up and those
    that a mask leaves out."""
    documents: int
    """Number of packed documents. It includes the document in the dropped tail."""


class SourceInfo(BaseModel):
    """What the data was made from. Equal sources give equal data."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    names: list[str]
    """The sources as they were given."""
    files: str = ""
    """Hash of the paths, sizes and times of the files. Empty in folders of earlier versions."""
    digest: str
    """Hash of all documents in order."""
    documents: int
    bad_documents: int = 0
    """Documents that could not be read and were skipped."""
    dropped_documents: int = 0
    """Duplicates that were left out."""
    field: str = "text"
    """The field or column that held a document."""
    prompt_field: str | None = None
    """The field or column of what stood before a document and is not predicted."""
    separator: str | None = None
    """What divided text files into documents."""
    similarity: float | None = None
    """The least similarity of near duplicates. None: they were not looked for."""
    drop_duplicates: bool = False
    characters: int
    validation_share: float
    trained_vocabulary: int | None
    """Vocabulary size of the tokenizer that was trained on this source.

    None where a tokenizer was given.
    """

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a prompt the record is that of earlier versions, and so is its identity."""
        content: dict[str, Any] = handler(self)
        if self.prompt_field is None:
            content.pop("prompt_field", None)
        return content


class SourceStatistics(BaseModel):
    """The statistics of one source, over both splits and with all duplicates."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    """The source as it was given."""
    documents: int
    bad_documents: int
    exact_duplicates: int
    near_duplicates: int | None
    """None if they were not looked for."""
    characters: int
    tokens: int
    """End-of-text tokens included."""
    unknown_tokens: int
    """Tokens that stand for characters which the vocabulary cannot write."""
    byte_tokens: int
    """Tokens that are single bytes of a character that has several."""
    lengths: dict[int, int]
    """Number of documents of 2^k up to 2^(k+1) - 1 tokens, by 2^k."""


class DatasetInfo(BaseModel):
    """The content of dataset.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1, 2] = 2
    """1: compressed shards. 2: flat ones, of which any row can be read alone."""
    vocab_size: int
    tokenizer_fingerprint: str
    end_of_text: int
    sequence_length: int
    unigram_entropy: float | None
    """Entropy of the predicted tokens' frequencies, in nats.

    A model that knows only these frequencies has this loss. None for a mixture.
    """
    packing: Packing = "cut"
    loss_mask: bool = False
    """Whether each row has a mask that says which of its tokens are to be predicted."""
    splits: dict[str, SplitInfo]
    source: SourceInfo
    sources: list[SourceStatistics] = []
    """Statistics of each source. Empty in folders of earlier versions."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without masks the record is that of earlier versions, and so is its identity."""
        content: dict[str, Any] = handler(self)
        if not self.loss_mask:
            content.pop("loss_mask", None)
        return content

    @property
    def compressed(self) -> bool:
        """Whether its shards are compressed."""
        return self.version == 1

    def identity(self) -> dict[str, Any]:
        """What tells whether two folders hold the same data, wherever they came from."""
        return self.model_dump(mode="json", exclude={"source": {"names", "files"}, "sources": True})

    @classmethod
    def load(cls, folder: Path, cache: CacheSettings = DEFAULT_CACHE) -> DatasetInfo:
        """Reads `folder`/dataset.json.

        cache: for a folder in an object store.

        Raises InputError where the folder is missing, empty, unfinished or not a data folder.
        Raises UnreachableError where its storage stays away.
        """
        folder = with_address(Path(folder))
        if is_remote(folder):
            return cls._parsed(folder / INFO, read_description(folder, INFO, cache))
        return patiently(lambda: cls._load(folder), folder)

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
        return cls._parsed(file, file.read_bytes())

    @classmethod
    def _parsed(cls, file: Path, content: bytes) -> DatasetInfo:
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(f"{file}: {field}: {first['msg']}, prepare the data again") from error
