"""Rows of a run's metrics.jsonl."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaconsa.errors import InputError
from megaconsa.files import parse_json

logger = logging.getLogger(__name__)

Row = dict[str, Any]
CLOCK = {
    *("time", "tokens_per_second", "step_seconds", "data_seconds", "memory_gib", "mfu"),
    *("rank_seconds", "slowest_rank", "slowest_rank_seconds", "largest_memory_gib"),
}
"""Fields that depend on the machine. All others are a function of the configuration."""


def read_metrics(path: Path) -> list[Row]:
    """Returns all rows, in order. Raises InputError if the file cannot be read."""
    return [row for _, row in read_lines(path)]


def read_lines(path: Path) -> list[tuple[bytes, Row]]:
    """Returns every line that is a JSON object with a step, as it is in the file, with its row.

    Other lines are left out. A warning names each of them except the last, because an interruption
    can cut off the last line.

    Raises InputError if the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"metrics {path} cannot be read: {error.strerror}") from None
    found: list[tuple[bytes, Row]] = []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is not None:
            found.append((line, row))
        elif number < len(lines):
            logger.warning(
                "metrics %s: line %d is not a JSON object with a step; it is left out", path, number
            )
    return found


def _parse(line: bytes) -> Row | None:
    """Returns the row of a line, or None if the line is not a JSON object with a step."""
    try:
        row = parse_json(line)
    except ValueError:  # Bytes that are not UTF-8 raise a ValueError too.
        return None
    if isinstance(row, dict) and isinstance(row.get("step"), int):
        return row
    return None


def computed(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows without the fields of `CLOCK`.

    Two runs that compute the same have the same rows here.
    """
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def series(
    rows: Sequence[Row], name: str, x: str = "step"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the fields `x` and `name` of the rows in which both are finite numbers.

    Returns two arrays of shape (rows,), which are empty if there is no such row.
    """
    points = []
    for row in rows:
        if _is_finite(row.get(name)) and _is_finite(row.get(x)):
            points.append((row[x], row[name]))
    values = np.array(points, dtype=np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def last(rows: Sequence[Row], name: str) -> float | None:
    """Returns the newest finite value of a field, or None if there is none."""
    for row in reversed(rows):
        if _is_finite(row.get(name)):
            return float(row[name])
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
