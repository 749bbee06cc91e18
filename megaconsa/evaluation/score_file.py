"""Reads scores of units from files: JSON tables, and the pattern files of DuoAttention."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaconsa.consa.constraint import Constraint
from megaconsa.errors import InputError
from megaconsa.files import parse_json

Row = tuple[str, list[Any]]
"""The place of a layer's scores in the file, for messages, and the scores as written there."""


def read_scores(path: Path, units: Constraint) -> Tensor:
    """Reads the scores in a file.

    A JSON file holds a list of lists of numbers, one list for each layer. It may be the field
    `scores` of an object. Any other file is read as a pattern file of DuoAttention: a line for each
    layer, a column for each KV head, where 1 is a retrieval head.

    Returns scores, (layers, units) fp64, larger for units that should stay full. Raises InputError,
    which names the file and the line or layer, if the content is no such table or does not fit the
    model.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--scores {path} cannot be read: {error}") from None
    is_json = text.lstrip().startswith(("[", "{"))
    rows = _json_rows(text, path) if is_json else _pattern_rows(text, path)
    if not rows:
        raise InputError(f"--scores {path} is empty; give a JSON table or DuoAttention's TSV")
    table = []
    for place, cells in rows:
        if len(cells) != units.units_per_layer:
            expected = f"a layer of the model has {units.units_per_layer} units"
            raise InputError(f"{place} holds {len(cells)} scores, but {expected}")
        table.append([_number(cell, place) for cell in cells])
    scores = torch.tensor(table, dtype=torch.float64)
    units.check_scores(scores, f"--scores {path}")
    return scores


def _pattern_rows(text: str, path: Path) -> list[Row]:
    """Splits a pattern file of DuoAttention."""
    rows: list[Row] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            rows.append((f"{path}, line {number}", line.split()))
    return rows


def _json_rows(text: str, path: Path) -> list[Row]:
    """Splits a JSON table."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise InputError(f"--scores {path} is not JSON: {error}") from None
    if isinstance(content, dict):
        content = content.get("scores")
    if not isinstance(content, list):
        raise InputError(f"--scores {path} has no list of lists, alone or as its field scores")
    rows: list[Row] = []
    for layer, cells in enumerate(content):
        place = f"{path}, layer {layer}"
        if not isinstance(cells, list):
            raise InputError(f"{place} is {cells!r}, which is not a list of scores")
        rows.append((place, cells))
    return rows


def _number(cell: Any, place: str) -> float:
    """Converts a score. Raises InputError unless it is a finite number."""
    try:
        # A bool would convert to a number, but is no score.
        value = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{place} holds {cell!r}, which is not a finite number")
    return value
