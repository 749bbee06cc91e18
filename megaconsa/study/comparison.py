"""Arithmetic of comparisons: differences with intervals, and the overlap of tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from megaconsa.evaluation.perplexity import ratio
from megaconsa.study.measures import SequenceLosses

T_QUANTILES = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)
"""97.5 % points of Student's t for 1, 2, ... degrees of freedom."""
NORMAL_QUANTILE = 1.95996

Table = Sequence[Sequence[bool]]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float | None
    """None if there is nothing to estimate it from, as for high."""
    high: float | None
    over: Literal["runs", "sequences"] | None
    """What varies: independent runs, or the held-out sequences of a single pair of runs.

    Independent runs differ in seed or draw.
    """


def t_quantile(freedom: int) -> float:
    """Returns the 97.5 % point of Student's t.

    Beyond the table it uses the expansion around the normal distribution, which is too small by
    less than 0.005.
    """
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    z = NORMAL_QUANTILE
    return z + (z**3 + z) / (4 * freedom)


def mean_difference(pairs: Sequence[tuple[SequenceLosses, SequenceLosses]]) -> Interval | None:
    """Returns how much more a token costs in the first of each pair than in the second.

    Both losses of a pair are on the same sequences. Several pairs give a t interval over their
    differences. A single pair gives the normal interval of its difference over sequences.

    Returns None if no token was measured.
    """
    found = [_paired(own, other) for own, other in pairs if sum(own.tokens)]
    if not found:
        return None
    if len(found) == 1:
        mean, error = found[0]
        if error is None:
            return Interval(mean, None, None, None)
        half = NORMAL_QUANTILE * error
        return Interval(mean, mean - half, mean + half, "sequences")
    differences = [mean for mean, _ in found]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = t_quantile(len(differences) - 1) * error
    return Interval(mean, mean - half, mean + half, "runs")


def _paired(own: SequenceLosses, other: SequenceLosses) -> tuple[float, float | None]:
    """Returns the difference of the means and its standard error over sequences."""
    return ratio(np.array(own.sums) - np.array(other.sums), np.array(own.tokens))


def overlap(table: Table, other: Table) -> float | None:
    """Returns the share of the full heads of `table` that are full in `other` too.

    Returns None if `table` has no full head.
    """
    full = 0
    common = 0
    for row, other_row in zip(table, other, strict=True):
        full += sum(row)
        common += sum(a and b for a, b in zip(row, other_row, strict=True))
    return common / full if full else None


def agreement(tables: Sequence[Table]) -> float | None:
    """Returns the mean overlap of all pairs of tables, or None for fewer than two tables."""
    return mean_of([overlap(a, b) for a, b in combinations(tables, 2)])


def mean_of(values: Sequence[float | None]) -> float | None:
    """Returns the mean of the known values, or None if no value is known."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None
