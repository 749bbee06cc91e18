"""Packing predicts every token once and records where documents begin."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megaconsa.data.packing import cut_stream, document_starts, fit_documents, mask_labels

END = 0
DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=12)


@given(DOCUMENTS, st.integers(1, 9))
def test_every_token_is_predicted_once(documents: list[list[int]], length: int) -> None:
    blocks = [np.array([*document, END]) for document in documents]
    stream = [token for block in blocks for token in block.tolist()]
    sequences = [row for block in cut_stream(blocks, length) for row in block]
    assert len(sequences) == max(0, len(stream) - 1) // length
    predicted = [int(token) for sequence in sequences for token in sequence[1:]]
    assert predicted == stream[1 : 1 + len(predicted)]
    for k, sequence in enumerate(sequences):
        assert sequence.tolist() == stream[k * length : k * length + length + 1]


@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=4))
def test_document_starts_and_labels(rows: list[list[int]]) -> None:
    tokens = np.array(rows, np.uint16)
    starts = document_starts(tokens[:, :-1], END)
    labels = mask_labels(tokens, END, True)
    assert starts.dtype == np.int32
    assert labels.dtype == np.int64
    for row, row_starts, row_labels in zip(rows, starts.tolist(), labels.tolist(), strict=True):
        start = 0
        for i, token in enumerate(row[:-1]):
            if i and row[i - 1] == END:
                start = i
            assert row_starts[i] == start
            assert row_labels[i] == (-100 if token == END else row[i + 1])
    joined = tokens[:, 1:].astype(np.int64)
    joined[(tokens[:, :-1] == END) & (joined == END)] = -100
    assert np.array_equal(mask_labels(tokens, END, False), joined)


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=1), st.integers(2, 9)
)
def test_documents_that_fit_stay_whole(documents: list[list[int]], length: int) -> None:
    blocks = [np.array([*document, END], np.uint16) for document in documents]
    lengths = np.array([len(block) for block in blocks])
    packed = fit_documents(np.concatenate(blocks), lengths, length, END)
    assert packed.dtype == np.uint16
    assert packed.shape[1] == length + 1
    labels = mask_labels(packed, END, True)
    # Each token but the first of its document is predicted once, from the token before it.
    expected: Counter[tuple[int, int]] = Counter()
    for document in documents:
        expected.update(pairwise([*document, END]))
    found: Counter[tuple[int, int]] = Counter()
    for row, row_labels in zip(packed.tolist(), labels.tolist(), strict=True):
        for token, label in zip(row[:-1], row_labels, strict=True):
            if label != -100:
                found[token, label] += 1
    assert found == expected
    # No two samples could be joined, so at most one is less than half full.
    used = [np.flatnonzero(row != END).max(initial=-1) + 2 for row in packed]
    assert sum(2 * tokens < length + 1 for tokens in used) <= 1
    for document in documents:
        if len(document) <= length:
            text = [*document, END]
            assert any(
                row[i : i + len(text)].tolist() == text
                for row in packed
                for i in range(length + 2 - len(text))
            )
