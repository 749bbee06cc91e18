"""Sets of moments, as intervals."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]
"""Start and end."""


def united(intervals: Iterable[Interval]) -> list[Interval]:
    """The intervals that cover the same moments, sorted and apart from each other."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((start, end))
    return result


def inside(intervals: Iterable[Interval], start: float, end: float) -> float:
    """The sum of the lengths of intervals that lie apart, as far as they lie between two moments.

    It is 0 where end is before start.
    """
    return sum(max(0.0, min(end, b) - max(start, a)) for a, b in intervals)
