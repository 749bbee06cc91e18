"""The results as a table for the terminal, CSV, markdown and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megaconsa.files import replace_text
from megaconsa.study.comparison import Interval
from megaconsa.study.results import ResultRow

HEADINGS = (
    "arm",
    "target",
    "trials",
    "loss",
    "over dense (95 %)",
    "over LOO",
    "far over dense",
    "needles",
    "sparsity",
    "overlap LOO",
    "agreement",
    "top 10",
    "cost",
)
NOTE = (
    "Losses in nats a token. "
    "Differences are paired with the dense arm of the same seed and budget, "
    "those over LOO with the leave-one-out arm of the same sparsity, seed and budget. "
    "(r): t interval over runs; (s): normal interval over the held-out sequences of a single pair."
)
MISSING = "-"
INTERVALS = ("difference", "far_difference", "leave_one_out_difference")
"""Fields of a row that are intervals."""


def cells(row: ResultRow) -> list[str]:
    """Returns the cells of a row as text, in the order of HEADINGS."""
    far = row.far_difference
    return [
        row.arm,
        _number(row.target, "g"),
        str(row.trials),
        f"{row.validation_loss:.4f}",
        interval_text(row.difference),
        interval_text(row.leave_one_out_difference),
        _number(far.mean if far else None, "+.4f"),
        _number(row.needle_accuracy, ".0%"),
        _number(row.sparsity, ".4g"),
        _number(row.leave_one_out_overlap, ".0%"),
        _number(row.agreement, ".0%"),
        _number(row.common_best, "d"),
        _number(row.cost, ".2f"),
    ]


def interval_text(interval: Interval | None) -> str:
    """Returns an interval as text, such as `+0.0123 ± 0.0045 (r)`.

    The letter says what varies: r for runs, s for sequences.
    """
    if interval is None:
        return MISSING
    if interval.high is None or interval.over is None:
        return f"{interval.mean:+.4f}"
    half = interval.high - interval.mean
    return f"{interval.mean:+.4f} ± {half:.4f} ({interval.over[0]})"


def aligned(rows: Sequence[ResultRow]) -> str:
    """Returns plain text with aligned columns, the same at any terminal width and in a log."""
    lines = [HEADINGS, *(cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join(padded).rstrip())
    return "\n".join(text)


def markdown(rows: Sequence[ResultRow]) -> str:
    """Returns the rows as a Markdown table with a note."""
    lines = [_markdown_line(HEADINGS), _markdown_line(["---"] * len(HEADINGS))]
    for row in rows:
        lines.append(_markdown_line(cells(row)))
    return "\n".join([*lines, "", NOTE, ""])


def write(rows: Sequence[ResultRow], out: Path) -> None:
    """Writes results.json, results.csv and results.md."""
    content = [asdict(row) for row in rows]
    replace_text(out / "results.json", json.dumps(content, indent=1) + "\n")
    replace_text(out / "results.csv", _csv(rows))
    replace_text(out / "results.md", markdown(rows))


def _csv(rows: Sequence[ResultRow]) -> str:
    """Returns one line per row, with numbers in full.

    Intervals take four columns: mean, low, high and over.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, row in enumerate(rows):
        fields = _flat(row)
        if number == 0:
            writer.writerow(fields)
        writer.writerow(fields.values())
    return text.getvalue()


def _flat(row: ResultRow) -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in asdict(row).items():
        if name in INTERVALS:
            for part in ("mean", "low", "high", "over"):
                fields[f"{name}_{part}"] = value and value[part]
        elif name != "full_share":
            fields[name] = value
    return fields


def _markdown_line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)
