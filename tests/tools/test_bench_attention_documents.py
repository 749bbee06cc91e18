"""The documents of bench-attention's packed cases: lengths, starts and bounds."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch

from megaconsa.benchmarks.attention.documents import (
    SHORTEST,
    document_bounds,
    document_lengths,
    document_starts,
)


def test_documents_fill_the_sequences() -> None:
    lengths = document_lengths(3, 8192, 600)
    assert lengths == document_lengths(3, 8192, 600)
    assert [sum(documents) for documents in lengths] == [8192] * 3
    starts = document_starts(lengths)
    assert starts.shape == (3, 8192)
    assert starts.dtype == torch.int32
    for row, documents in zip(starts, lengths, strict=True):
        found, counts = row.unique_consecutive(return_counts=True)
        assert counts.tolist() == documents
        assert found.tolist() == list(accumulate(documents[:-1], initial=0))
    bounds = document_bounds(starts)
    assert bounds.dtype == torch.int32
    assert bounds.diff().tolist() == [length for documents in lengths for length in documents]
    assert bounds[0] == 0


def test_lengths_of_documents_are_realistic() -> None:
    (lengths,) = document_lengths(1, 10_000_000, 600)
    drawn = torch.tensor(lengths[:-1], dtype=torch.float64)
    assert drawn.median() == pytest.approx(600, rel=0.03)
    assert drawn.mean() == pytest.approx(600 * math.exp(0.5), rel=0.03)
    assert drawn.log().std() == pytest.approx(1, rel=0.03)
    assert drawn.min() >= SHORTEST


def test_the_rest_of_a_document_is_a_document_of_the_next_sequence() -> None:
    """Joined in order, the same draws are cut at other places."""
    short = document_lengths(8, 1000, 60)
    ends = set(accumulate(length for documents in short for length in documents))
    (long,) = document_lengths(1, 8000, 60)
    assert max(long) <= 1000
    assert ends == set(accumulate(long)) | set(range(1000, 8001, 1000))


def test_documents_are_clipped() -> None:
    assert document_lengths(3, 10, 600) == [[10]] * 3
    assert document_lengths(1, 48, 1) == [[16, 16, 16]]
