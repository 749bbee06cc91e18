"""Packing predicts every token once and records where documents begin."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megaconsa.data.packing import document_starts, mask_labels, pack

END = 0
DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=12)


@given(DOCUMENTS, st.integers(1, 9))
def test_every_token_is_predicted_once(documents: list[list[int]], length: int) -> None:
    stream = [token for document in documents for token in [*document, END]]
    sequences = list(pack(iter(documents), length, END))
    assert len(sequences) == max(0, len(stream) - 1) // length
    assert all(
        sequence.shape == (length + 1,) and sequence.dtype == np.int64 for sequence in sequences
    )
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
    assert np.array_equal(mask_labels(tokens, END, False), tokens[:, 1:])
