"""Tables that commands print: the same rows as text, Markdown, CSV or JSON.

As text, no word is cut and no figure is split. On a terminal that is too narrow, notes go below
their row, and columns that do not fit follow in further blocks. Elsewhere each row is one line.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import typer
from rich.cells import cell_len

from megaconsa.console import console
from megaconsa.errors import InputError

Form = Literal["text", "json", "csv", "markdown"]
Value = str | int | float | bool | None

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, with unrounded figures.")]
CsvOption = Annotated[bool, typer.Option("--csv", help="Print CSV, with unrounded figures.")]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")]

GAP = "  "
"""Between two columns."""
SHORTEST_NOTE = 24
"""Columns of the terminal that a note needs beside its row. With fewer it goes below the row."""


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and for programs its unrounded value and standard error."""

    text: str = ""
    value: Value = None
    error: float | None = None


@dataclass(frozen=True)
class Row:
    cells: Sequence[Cell | str]
    """One for each column. Missing ones at the end are empty."""
    note: str = ""
    section: str = ""
    """The title of the rows that belong together."""


@dataclass
class Table:
    headings: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    left: Sequence[int] = (0,)
    """Columns that are aligned to the left. The others hold figures."""

    def cells(self, row: Row) -> list[Cell]:
        """Returns a cell for each column."""
        found = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row.cells]
        return found + [Cell()] * (len(self.headings) - len(found))


def form_of(*, as_json: bool, as_csv: bool, as_markdown: bool) -> Form:
    """Returns the form that the options ask for. Raises InputError if they ask for several."""
    asked: list[Form] = []
    if as_json:
        asked.append("json")
    if as_csv:
        asked.append("csv")
    if as_markdown:
        asked.append("markdown")
    if len(asked) > 1:
        raise InputError(f"--{asked[0]} and --{asked[1]} are both given; choose one of them")
    return asked[0] if asked else "text"


def show(table: Table, form: Form = "text") -> None:
    """Prints a table to stdout."""
    if form == "json":
        print(json.dumps(records(table), indent=1))
    elif form == "csv":
        print(to_csv(table), end="")
    elif form == "markdown":
        print(to_markdown(table))
    else:
        width = console.width if console.is_terminal else None
        for style, line in text_lines(table, width):
            console.print(line, style=style, markup=False)


def records(table: Table) -> list[dict[str, Value]]:
    """Returns a mapping for each row, with unrounded values.

    A column with standard errors is followed by one with them, `HEADING ±`.
    """
    names = [heading or "quantity" for heading in table.headings]
    by_row = [table.cells(row) for row in table.rows]
    has_error = [any(cells[n].error is not None for cells in by_row) for n in range(len(names))]
    found = []
    for row, cells in zip(table.rows, by_row, strict=True):
        record: dict[str, Value] = {}
        if any(other.section for other in table.rows):
            record["section"] = row.section
        for number, (name, cell) in enumerate(zip(names, cells, strict=True)):
            text = cell.text.strip() or None
            record[name] = text if cell.value is None else cell.value
            if has_error[number]:
                record[f"{name} ±"] = cell.error
        if any(other.note for other in table.rows):
            record["note"] = row.note or None
        found.append(record)
    return found


def to_csv(table: Table) -> str:
    """Returns one line per row, after a line of headings."""
    rows = records(table)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def to_markdown(table: Table) -> str:
    """Returns a Markdown table with the texts of the cells. A section is a bold row."""
    has_notes = any(row.note for row in table.rows)
    headings = [*table.headings, *([""] if has_notes else [])]
    rules = [
        "---" if n in table.left or n >= len(table.headings) else "---:"
        for n in range(len(headings))
    ]
    lines = [headings, rules]
    section = ""
    for row in table.rows:
        if row.section != section:
            section = row.section
            lines.append([f"**{section}**", *[""] * (len(headings) - 1)])
        cells = [cell.text.strip() for cell in table.cells(row)]
        lines.append(cells + ([row.note] if has_notes else []))
    return "\n".join(_markdown_line(line) for line in lines)


def _markdown_line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def text_lines(table: Table, width: int | None) -> Iterator[tuple[str, str]]:
    """Returns lines of text, each with its style: `bold`, `dim` or none.

    width: columns of the terminal. None prints each row in one line.
    """
    widths = []
    for number, heading in enumerate(table.headings):
        texts = [heading, *(table.cells(row)[number].text for row in table.rows)]
        widths.append(max(map(cell_len, texts)))
    for block_number, block in enumerate(_blocks(widths, width)):
        if block_number:
            yield "", ""
        yield from _block_lines(table, widths, block, width, with_notes=block_number == 0)


def _blocks(widths: Sequence[int], width: int | None) -> list[list[int]]:
    """Divides the columns into blocks that fit. Each begins with the first column."""
    blocks = [[0]]
    used = widths[0]
    for number in range(1, len(widths)):
        more = len(GAP) + widths[number]
        if width is not None and used + more > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(number)
        used += more
    return blocks


def _block_lines(
    table: Table,
    widths: Sequence[int],
    block: Sequence[int],
    width: int | None,
    *,
    with_notes: bool,
) -> Iterator[tuple[str, str]]:
    used = sum(widths[number] for number in block) + len(GAP) * (len(block) - 1)
    longest = max((cell_len(row.note) for row in table.rows), default=0)
    beside = width is None or used + len(GAP) + min(longest, SHORTEST_NOTE) <= width
    yield "bold", _aligned(table, table.headings, widths, block).rstrip()
    section = ""
    for row in table.rows:
        if row.section != section:
            section = row.section
            yield "", ""
            yield "bold", section
        line = _aligned(table, [cell.text for cell in table.cells(row)], widths, block)
        if not with_notes or not row.note:
            yield "", line.rstrip()
        elif width is None:
            yield "", f"{line}{GAP}{row.note}"
        elif beside:
            first, *others = _wrapped(row.note, width - used - len(GAP))
            yield "", f"{line}{GAP}{first}"
            for other in others:
                yield "", " " * (used + len(GAP)) + other
        else:
            yield "", line.rstrip()
            for part in _wrapped(row.note, width - 6):
                yield "dim", " " * 6 + part


def _aligned(
    table: Table, texts: Sequence[str], widths: Sequence[int], block: Sequence[int]
) -> str:
    parts = []
    for number in block:
        padding = " " * (widths[number] - cell_len(texts[number]))
        is_left = number in table.left
        parts.append(texts[number] + padding if is_left else padding + texts[number])
    return GAP.join(parts)


def _wrapped(text: str, width: int) -> list[str]:
    """Breaks a note between words. A word that is longer than the width stays whole."""
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False)
