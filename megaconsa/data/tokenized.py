"""Tokenized pieces: what the processes of a preparation write, and what packing reads.

A piece is some files of one name:

    NAME.tokens           ids of all documents, each followed by the end-of-text token
    NAME.mask             a byte for each id, 1 where it is to be predicted; only if a document has
                          ids that are not
    NAME.documents.npy    one record per document (DOCUMENT)
    NAME.json             counts; written last, so a piece without it is unfinished
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict

from megaconsa.data.packing import masked_type
from megaconsa.data.shard_file import COLUMN, LOSS_MASK

DOCUMENT = np.dtype([("hash", "<u8"), ("characters", "<u4"), ("tokens", "<u4")])
"""hash: of the content (xxh3_64). characters: 0 where it came as ids. tokens: with end-of-text."""
FINISHED = ".json"


class TokenizedPiece(BaseModel):
    """The counts of a tokenized piece."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    documents: int
    tokens: int
    masked: bool = False
    """Whether it has a mask."""
    unknown_tokens: int
    byte_tokens: int
    bad_documents: int
    bad: list[str]
    """What is wrong with the first few bad documents."""


def token_type(vocab_size: int) -> np.dtype:
    """The stored type of ids. They have two bytes where the vocabulary fits."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def find(folder: Path, name: str) -> TokenizedPiece | None:
    """The counts of a piece, or None if it is not finished."""
    file = folder / (name + FINISHED)
    if not file.exists():
        return None
    return TokenizedPiece.model_validate_json(file.read_bytes())


class PieceWriter:
    """Writes a tokenized piece."""

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self._folder = folder
        self._name = name
        self._type = token_type(vocab_size)
        self._file = (folder / f"{name}.tokens").open("wb")
        self._mask: BinaryIO | None = None
        self._tokens = 0
        self._documents: list[tuple[int, int, int]] = []

    def add(
        self, content_hash: int, characters: int, ids: np.ndarray, mask: np.ndarray | None = None
    ) -> None:
        """Adds a document.

        content_hash: xxh3_64 of the text, or of the ids where they are all that is known.
        characters: length of the text, or 0.
        ids: (n,) with the end-of-text token at the end.
        mask: (n,) uint8, 1 where an id is to be predicted. None: all are.
        """
        self._write_mask(len(ids), mask)
        self._file.write(ids.astype(self._type).tobytes())
        self._documents.append((content_hash, characters, len(ids)))

    def _write_mask(self, count: int, mask: np.ndarray | None) -> None:
        """Writes the mask of `count` ids. The file begins with the first mask."""
        if mask is not None and self._mask is None:
            self._mask = (self._folder / f"{self._name}.mask").open("wb")
            self._mask.write(b"\1" * self._tokens)
        if self._mask is not None:
            self._mask.write(b"\1" * count if mask is None else mask.tobytes())
        self._tokens += count

    def finish(
        self, *, unknown_tokens: int, byte_tokens: int, bad_documents: int, bad: list[str]
    ) -> TokenizedPiece:
        """Writes the counts, which finishes the piece."""
        self._file.close()
        if self._mask is not None:
            self._mask.close()
        documents = np.array(self._documents, DOCUMENT)
        np.save(self._folder / f"{self._name}.documents.npy", documents)
        piece = TokenizedPiece(
            documents=len(documents),
            tokens=self._tokens,
            masked=self._mask is not None,
            unknown_tokens=unknown_tokens,
            byte_tokens=byte_tokens,
            bad_documents=bad_documents,
            bad=bad,
        )
        unfinished = self._folder / f"{self._name}.unfinished"
        unfinished.write_text(piece.model_dump_json())
        os.replace(unfinished, self._folder / (self._name + FINISHED))
        return piece


def documents(folder: Path, name: str) -> np.ndarray:
    """The records of a piece's documents, (n,) DOCUMENT."""
    loaded: np.ndarray = np.load(folder / f"{name}.documents.npy")
    return loaded


def tokens(folder: Path, name: str, vocab_size: int) -> np.ndarray:
    """The ids of a piece, in the stored type."""
    file = folder / f"{name}.tokens"
    if not file.stat().st_size:
        return np.empty(0, token_type(vocab_size))
    return np.memmap(file, token_type(vocab_size), mode="r")


def masked_tokens(folder: Path, name: str, vocab_size: int) -> np.ndarray:
    """The ids of a piece and their mask, (n,) of `masked_type`."""
    ids = tokens(folder, name, vocab_size)
    found = np.empty(len(ids), masked_type(ids.dtype))
    found[COLUMN] = ids
    file = folder / f"{name}.mask"
    found[LOSS_MASK] = np.fromfile(file, np.uint8) if file.exists() else 1
    return found


def remove_unfinished(folder: Path, names: Iterable[str]) -> None:
    """Removes every file of the folder that belongs to none of the pieces."""
    kept = set(names)
    for file in folder.iterdir():
        if file.name.split(".")[0] not in kept:
            file.unlink()
