"""Packing of documents into sequences of equal length, and finding the documents in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

IGNORED = -100
"""The label of a position that is not predicted (cross_entropy's ignore_index)."""


def pack(
    documents: Iterable[Sequence[int]], sequence_length: int, end_of_text: int
) -> Iterator[np.ndarray]:
    """Joins the documents and cuts the stream into samples, (S + 1,) int64 arrays.

    documents: token ids of each document.
    sequence_length: S, in tokens.
    end_of_text: id of the token that is added after each document.

    Sample k is stream[k*S : k*S + S + 1]. Neighbours share one token, so each token except the
    stream's first is predicted exactly once. The incomplete tail is dropped.
    """
    parts: list[np.ndarray] = []
    held = 0
    for document in documents:
        parts.append(np.append(np.asarray(document, dtype=np.int64), end_of_text))
        held += len(parts[-1])
        if held <= sequence_length:
            continue
        stream = np.concatenate(parts)
        start = 0
        while held - start > sequence_length:
            yield stream[start : start + sequence_length + 1]
            start += sequence_length
        parts = [stream[start:]]
        held -= start


def document_starts(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """The index in its sequence at which each position's document begins.

    tokens: (B, S) integers.

    Returns (B, S) int32. A document begins at 0 and after each end_of_text token. That token
    belongs to the document that it ends. The values do not decrease along a sequence, so they serve
    as document ids. Positions within the document are arange(S) - starts.
    """
    length = tokens.shape[1]
    last = tokens == end_of_text
    # A document ends with its sequence too. The sequences can then lie one behind the other.
    last[:, -1] = True
    ends = np.flatnonzero(last) + 1
    begins = np.concatenate([[0], ends[:-1]])
    starts = (begins % length).astype(np.int32)
    return np.repeat(starts, ends - begins).reshape(tokens.shape)


def mask_labels(tokens: np.ndarray, end_of_text: int, separate_documents: bool) -> np.ndarray:
    """The labels of a batch: the next tokens.

    tokens: (B, S + 1) integers.

    Returns (B, S) int64. Where documents are separate, an end_of_text input predicts nothing
    (-100), because the first token of another document follows it.
    """
    labels = tokens[:, 1:].astype(np.int64)
    if separate_documents:
        labels[tokens[:, :-1] == end_of_text] = IGNORED
    return labels
