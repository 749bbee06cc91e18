"""Restores the held-out documents of a data folder from the sequences that packing made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megaconsa.console import progress
from megaconsa.data.dataset_info import VALIDATION
from megaconsa.data.token_mixture import open_sequences


class HeldOut:
    """Documents of the validation split, in stored order.

    A document that packing cut into several sequences is whole here.
    """

    def __init__(self, data: Path) -> None:
        """Reads the split once, to find where documents end.

        Raises InputError or DataError if the data folder is damaged.
        """
        self._shards = open_sequences(data, VALIDATION)
        self.info = self._shards.info
        length = self.info.sequence_length
        sequences = len(self._shards)
        self._total = sequences * length + 1  # neighbouring rows share a token
        ends = []
        with progress("reading held-out documents", sequences, "sequences") as task:
            for number in range(sequences):
                row = self._shards[number]
                # The last token of a row is the first of the next one.
                if number < sequences - 1:
                    row = row[:-1]
                ends.append(np.flatnonzero(row == self.info.end_of_text) + number * length + 1)
                task.advance()
        bounds = np.concatenate([[0], *ends, [self._total]])
        lengths = np.diff(bounds)
        self.starts: NDArray[np.int64] = bounds[:-1][lengths > 0]
        self.lengths: NDArray[np.int64] = lengths[lengths > 0]
        """Tokens of each document, including its end-of-text token. The last document may lack that
        token, because packing drops tokens that fill no sequence."""
        self.text_tokens = self._total - sum(map(len, ends))
        """Tokens of all documents, without end-of-text tokens."""

    def document(self, index: int, limit: int) -> NDArray[np.int64]:
        """Returns the first `limit` tokens of a document, or all of them if it is shorter.

        The end-of-text token counts as one of them.
        """
        return self._tokens(int(self.starts[index]), min(int(self.lengths[index]), limit))

    def text(self, index: int, count: int) -> NDArray[np.int64]:
        """Returns `count` ids of running text, without end-of-text tokens.

        index: the document at whose beginning the text starts. The first document follows the last.
        count: at most `text_tokens`.
        """
        parts = [np.empty(0, np.int64)]
        missing = count
        while missing:
            tokens = self.document(index, missing + 1)
            parts.append(tokens[tokens != self.info.end_of_text][:missing])
            missing -= len(parts[-1])
            index = (index + 1) % len(self.starts)
        return np.concatenate(parts)

    def _tokens(self, start: int, count: int) -> NDArray[np.int64]:
        """Returns `count` tokens from token `start` on of the stream that packing cut into rows."""
        length = self.info.sequence_length
        first = start // length
        # The very last token is the extra one of the last row.
        last = min((start + count - 1) // length, len(self._shards) - 1)
        rows = [self._shards[number][:-1] for number in range(first, last)] + [self._shards[last]]
        return np.concatenate(rows)[start - first * length :][:count].astype(np.int64)
