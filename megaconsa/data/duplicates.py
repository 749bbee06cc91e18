"""Documents that repeat an earlier document of the same source, exactly or nearly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from rensa import RMinHash, RMinHashDeduplicator

from megaconsa.console import progress
from megaconsa.data import tokenized
from megaconsa.data.tokenization import NamedPiece, by_source

SHINGLE = 5
"""Tokens of a shingle. Two documents are as similar as the sets of their shingles."""
PERMUTATIONS = 128
"""Hash functions of a MinHash signature."""
SEED = 42
UNIQUE = 0
EXACT = 1
NEAR = 2


def find_duplicates(
    pieces: Sequence[NamedPiece], folder: Path, vocab_size: int, similarity: float | None
) -> list[np.ndarray]:
    """For each piece, what each of its documents is: UNIQUE, EXACT or NEAR, (n,) uint8.

    similarity: the least Jaccard similarity of near duplicates, in (0, 1]. None: near duplicates
        are not looked for.

    The first of several equal documents is unique. Documents are equal if their 64-bit hashes are,
    which among 10^9 different documents happens by chance with a probability of 3 %. Near
    duplicates are found by MinHash and locality-sensitive hashing (Broder 1997), so documents near
    the threshold may be taken for either.
    """
    kinds = _exact(pieces, folder)
    if similarity is None:
        return kinds
    found: dict[str, RMinHashDeduplicator] = {}
    total = sum(len(kind) for kind in kinds)
    with progress("comparing", total, "documents") as task:
        for piece, kind in zip(pieces, kinds, strict=True):
            if piece.source not in found:
                found[piece.source] = RMinHashDeduplicator(
                    similarity, PERMUTATIONS, True, None, SEED
                )
            unique = np.flatnonzero(kind == UNIQUE)
            is_new = _add(found[piece.source], piece, folder, vocab_size, unique)
            kind[unique[~is_new]] = NEAR
            task.advance(len(kind))
    return kinds


def _exact(pieces: Sequence[NamedPiece], folder: Path) -> list[np.ndarray]:
    """For each piece, whether each document repeats an earlier one exactly."""
    kinds = [np.full(piece.counts.documents, EXACT, np.uint8) for piece in pieces]
    for indices in by_source(pieces).values():
        hashes = [tokenized.documents(folder, pieces[index].name)["hash"] for index in indices]
        _, firsts = np.unique(np.concatenate(hashes), return_index=True)
        joined = np.full(sum(map(len, hashes)), EXACT, np.uint8)
        joined[firsts] = UNIQUE
        begin = 0
        for index in indices:
            end = begin + len(kinds[index])
            kinds[index][:] = joined[begin:end]
            begin = end
    return kinds


def _add(
    found: RMinHashDeduplicator,
    piece: NamedPiece,
    folder: Path,
    vocab_size: int,
    chosen: np.ndarray,
) -> np.ndarray:
    """Adds documents of a piece to those found so far. Returns whether each is new.

    chosen: the indices of the documents.
    """
    ids = tokenized.tokens(folder, piece.name, vocab_size)
    ends = np.cumsum(tokenized.documents(folder, piece.name)["tokens"], dtype=np.int64)
    signatures = []
    for index in chosen:
        begin = ends[index - 1] if index else 0
        signature = RMinHash(PERMUTATIONS, SEED)
        # The last token is the end of text.
        signature.update(_shingles(ids[begin : ends[index] - 1]))
        signatures.append((f"{piece.name}/{index}", signature))
    return np.array(found.add_pairs(signatures), bool)


def _shingles(ids: np.ndarray) -> list[bytes]:
    """The bytes of each run of SHINGLE tokens. A shorter document is one shingle."""
    length = min(SHINGLE, len(ids))
    if not length:
        return [b""]
    windows = np.ascontiguousarray(sliding_window_view(ids, length))
    shingles: list[bytes] = windows.view(f"V{length * ids.itemsize}").reshape(-1).tolist()
    return shingles
