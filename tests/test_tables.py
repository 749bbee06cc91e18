"""Tables of commands: whole words and figures at any width, and the same rows in every form."""

from __future__ import annotations

import csv
import io
import json

import pytest

from megaconsa.errors import InputError
from megaconsa.tables import (
    Cell,
    Row,
    Table,
    form_of,
    records,
    show,
    text_lines,
    to_csv,
    to_markdown,
)

NOTE = "a note of several words that does not fit beside its row on a narrow terminal"


def table() -> Table:
    return Table(
        ("", "first model", "second model", "third model"),
        [
            Row(
                ("loss", Cell("1.25 ±0.5", 1.2512, 0.5), "-", Cell("12,345", 12_345)), NOTE, "Part"
            ),
            Row(("a|b", "none"), section="Other"),
        ],
    )


def text(width: int | None) -> list[str]:
    return [line for _, line in text_lines(table(), width)]


def test_one_line_a_row_in_a_pipe() -> None:
    lines = text(None)
    (row,) = [line for line in lines if line.startswith("loss")]
    assert row.split("  ")[-1] == NOTE
    assert lines.index("Part") < lines.index(row) < lines.index("Other")


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_nothing_is_cut(width: int) -> None:
    lines = text(width)
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    for part in ("1.25 ±0.5", "12,345", "second model", "third model"):
        assert any(part in line for line in lines)
    assert " ".join(NOTE.split()) in " ".join(words)


def test_columns_that_do_not_fit_follow_with_their_rows() -> None:
    lines = text(40)
    assert sum(line.startswith("loss") for line in lines) == 2
    assert sum(line.startswith("a|b") for line in lines) == 2


def test_csv_and_json_hold_the_same_unrounded_rows() -> None:
    rows = records(table())
    assert rows[0] == {
        "section": "Part",
        "quantity": "loss",
        "first model": 1.2512,
        "first model ±": 0.5,
        "second model": "-",
        "third model": 12_345,
        "note": NOTE,
    }
    read = list(csv.DictReader(io.StringIO(to_csv(table()))))
    as_text = [{name: "" if x is None else str(x) for name, x in row.items()} for row in rows]
    assert read == as_text


def test_markdown() -> None:
    lines = to_markdown(table()).splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines} == {6}
    assert lines[1] == "| --- | ---: | ---: | ---: | --- |"
    assert lines[3] == f"| loss | 1.25 ±0.5 | - | 12,345 | {NOTE} |"
    assert lines[5].startswith("| a\\|b |")


def test_forms(capsys: pytest.CaptureFixture[str]) -> None:
    show(table(), "json")
    assert json.loads(capsys.readouterr().out) == records(table())
    assert form_of(as_json=False, as_csv=True, as_markdown=False) == "csv"
    with pytest.raises(InputError, match="--csv and --markdown are both given"):
        form_of(as_json=False, as_csv=True, as_markdown=True)
