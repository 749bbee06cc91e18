"""The held-out documents of a data folder, put together again from the sequences that they were packed into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megaconsa.console import progress
from megaconsa.data.shards import VALIDATION
from megaconsa.data.stream import TokenShards


class HeldOut:
    """Documents of the validation split in stored order; one that packing cut over several sequences is whole here."""

    def __init__(self, data: Path) -> None:
        """Reads the split once, for where documents end. InputError or DataError where the data folder is not sound."""
        self._shards = TokenShards(data, VALIDATION)
        self.info = self._shards.info
        length, sequences = self.info.sequence_length, len(self._shards)
        self._total = sequences * length + 1  # neighbours share a token
        ends = []
        with progress("reading held-out documents", sequences, "sequences") as task:
            for number in range(sequences):
                row = self._shards[number]
                # The last token of a row is the first of the next one.
                row = row if number == sequences - 1 else row[:-1]
                ends.append(np.flatnonzero(row == self.info.end_of_text) + number * length + 1)
                task.advance()
        bounds = np.concatenate([[0], *ends, [self._total]])
        lengths = np.diff(bounds)
        self.starts: NDArray[np.int64] = bounds[:-1][lengths > 0]
        self.lengths: NDArray[np.int64] = lengths[lengths > 0]
        """Tokens of each document with its end-of-text token. The last document may lack that: packing drops what fills no sequence."""
        self.text_tokens = self._total - sum(map(len, ends))
        """Tokens without the end-of-text ones."""

    def document(self, index: int, limit: int) -> NDArray[np.int64]:
        """The first `limit` tokens of a document, or all of them, its end-of-text token included."""
        return self._tokens(int(self.starts[index]), min(int(self.lengths[index]), limit))

    def text(self, index: int, count: int) -> NDArray[np.int64]:
        """`count` (at most `text_tokens`) ids of running text from the beginning of a document on, without end-of-text tokens.

        After the last document comes the first.
        """
        parts, missing = [np.empty(0, np.int64)], count
        while missing:
            tokens = self.document(index, missing + 1)
            parts.append(tokens[tokens != self.info.end_of_text][:missing])
            missing -= len(parts[-1])
            index = (index + 1) % len(self.starts)
        return np.concatenate(parts)

    def _tokens(self, start: int, count: int) -> NDArray[np.int64]:
        """A piece of the stream that packing cut."""
        length = self.info.sequence_length
        first, last = start // length, min((start + count - 1) // length, len(self._shards) - 1)
        rows = [self._shards[number][:-1] for number in range(first, last)] + [self._shards[last]]
        return np.concatenate(rows)[start - first * length :][:count].astype(np.int64)
