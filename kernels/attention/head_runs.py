"""Neighbouring heads of one kind, which take one call of FlashAttention together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple


class Run(NamedTuple):
    """Neighbouring heads of one kind, as slices of the KV heads and of the query heads."""

    window: int | None
    """None is full attention."""
    kv: slice
    q: slice


def runs(windows: Sequence[int], length: int, group: int) -> Iterator[Run]:
    """Cut the heads into runs that are as long as possible.

    windows: one per KV head.
    length: tokens of a sequence. Windows of at least that are full attention.
    group: query heads per KV head.
    """
    kinds = (None if window >= length else window for window in windows)
    first = 0
    for window, heads in groupby(kinds):
        last = first + len(list(heads))
        yield Run(window, slice(first, last), slice(first * group, last * group))
        first = last
