"""The documents of a split, chosen from the tokenized pieces and packed into sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megaconsa.console import progress
from megaconsa.data import tokenized
from megaconsa.data.dataset_info import VALIDATION
from megaconsa.data.document import Document
from megaconsa.data.duplicates import UNIQUE
from megaconsa.data.packing import cut_stream, fit_documents
from megaconsa.data.preparation_options import Options
from megaconsa.data.tokenization import NamedPiece
from megaconsa.data.tokenizer import Tokenizer


def in_validation(document: Document, share: float) -> bool:
    """Whether a document is held out. The result depends on its content and the share alone."""
    return document.hash() < _limit(share)


def _limit(share: float) -> int:
    """The documents with smaller hashes are held out."""
    return math.ceil(share * 2**64)


class SplitDocuments:
    """The documents of one split, in order."""

    def __init__(
        self,
        split: str,
        folder: Path,
        pieces: Sequence[NamedPiece],
        kinds: Sequence[np.ndarray],
        tokenizer: Tokenizer,
        options: Options,
    ) -> None:
        """kinds: for each piece, what its documents are (duplicates.py)."""
        self._split = split
        self._folder = folder
        self._pieces = pieces
        self._tokenizer = tokenizer
        self._options = options
        self._chosen: list[np.ndarray] = []
        for piece, kind in zip(pieces, kinds, strict=True):
            hashes = tokenized.documents(folder, piece.name)["hash"]
            held_out = hashes < np.uint64(_limit(options.validation_share))
            chosen = held_out if split == VALIDATION else ~held_out
            if options.drop_duplicates:
                chosen &= kind == UNIQUE
            self._chosen.append(chosen)
        self.documents = int(sum(chosen.sum() for chosen in self._chosen))
        self.masked = any(piece.counts.masked for piece in pieces)
        """Whether sequences have masks."""
        self.filling = 0
        """Tokens that fill sequences up without a mask that says so, among the sequences so far."""

    def sequences(self) -> Iterator[np.ndarray]:
        """The packed sequences, (n, S + 1) ids at a time. With masks, they are of `masked_type`."""
        length = self._options.sequence_length
        if self._options.packing == "cut":
            yield from cut_stream((ids for ids, _ in self._ids()), length)
            return
        end = self._tokenizer.end_of_text
        for ids, lengths in self._ids():
            if self.masked:
                # What fills a sequence up is never predicted.
                filling = np.array((end, 0), ids.dtype)
                yield fit_documents(ids, lengths, length, filling)
                continue
            packed = fit_documents(ids, lengths, length, end)
            ends = packed == end
            self.filling += int((ends[:, 1:] & ends[:, :-1]).sum())
            yield packed

    def _ids(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The ids of the documents of each piece, joined, and the documents' lengths."""
        read = tokenized.masked_tokens if self.masked else tokenized.tokens
        title = f"packing {self._split}"
        with progress(title, self.documents, "documents") as task:
            for piece, chosen in zip(self._pieces, self._chosen, strict=True):
                lengths = tokenized.documents(self._folder, piece.name)["tokens"]
                ids = read(self._folder, piece.name, self._tokenizer.vocab_size)
                if chosen.any():
                    yield ids[np.repeat(chosen, lengths)], lengths[chosen]
                task.advance(int(chosen.sum()))
