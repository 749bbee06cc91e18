"""Rows of a run's metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaconsa.errors import InputError

Row = dict[str, Any]
CLOCK = {
    *("tokens_per_second", "step_seconds", "data_seconds", "memory_gib", "mfu"),
    *("rank_seconds", "slowest_rank", "slowest_rank_seconds", "largest_memory_gib"),
}
"""Fields that the machine decides; the others of a row are a function of the configuration."""


def read_metrics(path: Path) -> list[Row]:
    """All rows, in order; a last line that was torn by an interruption is left out.

    Raises InputError where the file is missing or another line is no JSON object with a step.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"metrics {path} cannot be read: {error.strerror}") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            raise InputError(f"metrics {path}: line {number} is not a JSON object with a step; remove it")
    return rows


def computed(rows: Sequence[Row]) -> list[Row]:
    """The rows without the fields of `CLOCK`: the same for two runs that compute the same."""
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def series(rows: Sequence[Row], name: str, x: str = "step") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`x` and values of one field over the rows that hold it as a finite number; two empty arrays where none does."""
    points = [(row[x], row[name]) for row in rows if _is_finite(row.get(name)) and _is_finite(row.get(x))]
    values = np.array(points, dtype=np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def last(rows: Sequence[Row], name: str) -> float | None:
    """The newest finite value of a field."""
    return next((float(row[name]) for row in reversed(rows) if _is_finite(row.get(name))), None)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
