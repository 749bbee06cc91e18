"""What each source of a data folder holds: its documents, their lengths, and rare tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megaconsa.data import tokenized
from megaconsa.data.dataset_info import SourceStatistics
from megaconsa.data.duplicates import EXACT, NEAR
from megaconsa.data.tokenization import NamedPiece, by_source


def source_statistics(
    pieces: Sequence[NamedPiece],
    kinds: Sequence[np.ndarray],
    folder: Path,
    *,
    near_duplicates_counted: bool,
) -> list[SourceStatistics]:
    """The statistics of each source, in the order of the pieces.

    kinds: for each piece, what its documents are (duplicates.py).
    """
    found = []
    for source, indices in by_source(pieces).items():
        counts = [pieces[index].counts for index in indices]
        repeats = np.concatenate([kinds[index] for index in indices])
        records = [tokenized.documents(folder, pieces[index].name) for index in indices]
        documents = np.concatenate(records)
        lengths = np.bincount(np.log2(documents["tokens"]).astype(np.int64))
        near = int((repeats == NEAR).sum())
        found.append(
            SourceStatistics(
                name=source,
                documents=len(documents),
                bad_documents=sum(piece.bad_documents for piece in counts),
                exact_duplicates=int((repeats == EXACT).sum()),
                near_duplicates=near if near_duplicates_counted else None,
                characters=int(documents["characters"].sum(dtype=np.int64)),
                tokens=sum(piece.tokens for piece in counts),
                unknown_tokens=sum(piece.unknown_tokens for piece in counts),
                byte_tokens=sum(piece.byte_tokens for piece in counts),
                lengths={1 << k: int(lengths[k]) for k in np.flatnonzero(lengths).tolist()},
            )
        )
    return found
