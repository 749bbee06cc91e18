"""Packing of documents into sequences of equal length, and finding the documents in them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from megaconsa.data.shard_file import COLUMN, LOSS_MASK

IGNORED = -100
"""The label of a position that is not predicted (cross_entropy's ignore_index)."""


def masked_type(ids: npt.DTypeLike) -> np.dtype:
    """The type of an id that knows whether it is predicted. Packing takes it in place of ids.

    ids: type of an id.
    """
    return np.dtype([(COLUMN, ids), (LOSS_MASK, np.uint8)])


def cut_stream(blocks: Iterable[np.ndarray], sequence_length: int) -> Iterator[np.ndarray]:
    """Cuts a stream of documents into samples, (n, S + 1) at a time.

    blocks: (n,) ids each. Together they are the documents, each with its end-of-text token.
    sequence_length: S, in tokens.

    Sample k is stream[k*S : k*S + S + 1]. Neighbours share one token, so each token except the
    stream's first is predicted exactly once. The incomplete tail is dropped.
    """
    rest = np.empty(0, np.int64)
    for block in blocks:
        stream = np.concatenate([rest, block]) if len(rest) else block
        samples = max(0, (len(stream) - 1) // sequence_length)
        if samples:
            windows = sliding_window_view(stream, sequence_length + 1)
            yield windows[: samples * sequence_length : sequence_length]
        rest = stream[samples * sequence_length :]


def fit_documents(
    ids: np.ndarray, lengths: np.ndarray, sequence_length: int, filling: int | np.ndarray
) -> np.ndarray:
    """Packs documents into as few samples as possible, without cutting those that fit.

    ids: (n,) all documents, each with its end-of-text token.
    lengths: (documents,) number of tokens of each.
    sequence_length: S, in tokens.
    filling: what fills free places: the end-of-text token, of the type of ids.

    Returns (samples, S + 1). A longer document is cut as in cut_stream, so that each of its tokens
    but the first is predicted. The parts are placed from the longest to the shortest, each where it
    leaves the least room (best-fit decreasing, Ding et al. 2024, arXiv 2404.10830).
    """
    room = sequence_length + 1
    parts: list[tuple[int, int]] = []
    begin = 0
    for length in lengths.tolist():
        for start in range(0, max(1, length - 1), sequence_length):
            parts.append((begin + start, min(room, length - start)))
        begin += length
    parts.sort(key=lambda part: (-part[1], part[0]))
    samples: list[list[tuple[int, int]]] = []
    # Free tokens and index of every sample with room, in ascending order.
    free: list[tuple[int, int]] = []
    for part in parts:
        place = bisect_left(free, (part[1], -1))
        if place == len(free):
            left, sample = room, len(samples)
            samples.append([])
        else:
            left, sample = free.pop(place)
        samples[sample].append(part)
        if left > part[1]:
            insort(free, (left - part[1], sample))
    packed = np.full((len(samples), room), filling, ids.dtype)
    for row, members in zip(packed, samples, strict=True):
        position = 0
        for start, length in members:
            row[position : position + length] = ids[start : start + length]
            position += length
    return packed


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


def mask_labels(
    tokens: np.ndarray,
    end_of_text: int,
    separate_documents: bool,
    masks: np.ndarray | None = None,
) -> np.ndarray:
    """The labels of a batch: the next tokens.

    tokens: (B, S + 1) integers.
    masks: (B, S + 1), 0 where a token is never predicted. None: there are no such tokens.

    Returns (B, S) int64. Where documents are separate, an end_of_text input predicts nothing
    (-100), because the first token of another document follows it. An end_of_text token after
    another fills a sequence up and is never predicted.
    """
    labels = tokens[:, 1:].astype(np.int64)
    ignored = tokens[:, :-1] == end_of_text
    if not separate_documents:
        ignored &= labels == end_of_text
    if masks is not None:
        ignored |= masks[:, 1:] == 0
    labels[ignored] = IGNORED
    return labels
