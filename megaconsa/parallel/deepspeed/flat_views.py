"""Vectors that lie in one flat tensor, as few views."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def joined(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Vectors of one storage, with those that follow each other in memory as one view."""
    views: list[Tensor] = []
    begin = 0
    for number, vector in enumerate(vectors):
        following = vectors[number + 1] if number + 1 < len(vectors) else None
        if following is None or not _follows(following, vector):
            first = vectors[begin]
            size = sum(part.numel() for part in vectors[begin : number + 1])
            views.append(first.as_strided((size,), (1,)))
            begin = number + 1
    return views


def _follows(vector: Tensor, other: Tensor) -> bool:
    """Whether a vector begins in memory where the other one ends."""
    is_next = vector.data_ptr() == other.data_ptr() + other.numel() * other.element_size()
    return is_next and vector.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
