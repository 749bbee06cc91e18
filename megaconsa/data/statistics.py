"""What each source of a data folder holds: documents, their lengths, and rare characters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megaconsa.data import tokenized
from megaconsa.data.dataset_info import SourceStatistics
from megaconsa.data.duplicates import EXACT, NEAR
from megaconsa.data.tokenization import NamedPiece
from megaconsa.data.tokenizer import Tokenizer


def source_statistics(
    pieces: Sequence[NamedPiece],
    kinds: Sequence[np.ndarray],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    near_duplicates_counted: bool,
) -> list[SourceStatistics]:
    """The statistics of each source, in the order of the pieces.

    kinds: for each piece, what its documents are (duplicates.py).
    """
    by_source: dict[str, list[int]] = {}
    for index, piece in enumerate(pieces):
        by_source.setdefault(piece.source, []).append(index)
    is_byte = np.zeros(tokenizer.vocab_size, bool)
    is_byte[tokenizer.byte_ids()] = True
    found = []
    for source, indices in by_source.items():
        characters = 0
        near = 0
        exact = 0
        frequencies = np.zeros(tokenizer.vocab_size, np.int64)
        lengths = np.zeros(33, np.int64)
        for index in indices:
            name = pieces[index].name
            documents = tokenized.documents(folder, name)
            ids = tokenized.tokens(folder, name, tokenizer.vocab_size)
            characters += int(documents["characters"].sum(dtype=np.int64))
            exact += int((kinds[index] == EXACT).sum())
            near += int((kinds[index] == NEAR).sum())
            frequencies += np.bincount(ids, minlength=tokenizer.vocab_size)
            powers = np.log2(documents["tokens"]).astype(np.int64)
            lengths += np.bincount(powers, minlength=len(lengths))
        unknown = tokenizer.unknown_id
        found.append(
            SourceStatistics(
                name=source,
                documents=sum(pieces[index].counts.documents for index in indices),
                bad_documents=sum(pieces[index].counts.bad_documents for index in indices),
                exact_duplicates=exact,
                near_duplicates=near if near_duplicates_counted else None,
                characters=characters,
                tokens=int(frequencies.sum()),
                unknown_tokens=0 if unknown is None else int(frequencies[unknown]),
                byte_tokens=int(frequencies[is_byte].sum()),
                lengths={1 << k: int(lengths[k]) for k in np.flatnonzero(lengths)},
            )
        )
    return found
