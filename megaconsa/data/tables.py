"""The rows of Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaconsa.data.bad_documents import OPTIONS, BadDocuments, fault_of_text
from megaconsa.data.formats import open_bytes
from megaconsa.data.sources import SourceFile
from megaconsa.errors import InputError

ROWS = 1024
"""Rows of a table that are read at a time."""


def table_rows(file: SourceFile, names: list[str], bad: BadDocuments) -> Iterator[tuple[str, ...]]:
    """The values of some columns in each row of a Parquet or Arrow file, or of a part of one.

    bad: counts rows in which a value is no text.

    Raises InputError where a column is missing or not UTF-8.
    """
    row = 0
    try:
        for columns in _columns(file, names):
            for values in zip(*columns, strict=True):
                row += 1
                if fault := _fault_of_row(values, names):
                    bad.add(f"{file.path}, row {_rows_before(file) + row}: {fault}")
                else:
                    yield values
    except UnicodeDecodeError as error:
        place = _rows_before(file) + row
        columns_named = " or ".join(f'"{name}"' for name in names)
        raise InputError(
            f"{file.path}, after row {place}: column {columns_named} is not UTF-8 ({error.reason})"
        ) from error


def _fault_of_row(values: tuple[Any, ...], names: list[str]) -> str | None:
    """What is wrong with a row, or None."""
    for value, name in zip(values, names, strict=True):
        if fault := fault_of_text(value, f'column "{name}"'):
            return fault
    return None


def _rows_before(file: SourceFile) -> int:
    """The number of rows before a part of a table."""
    from pyarrow import parquet

    if not file.begin:
        return 0
    with open_bytes(file.path) as opened:
        metadata = parquet.read_metadata(opened)
    return sum(metadata.row_group(group).num_rows for group in range(file.begin))


def _columns(file: SourceFile, names: list[str]) -> Iterator[list[list[Any]]]:
    """The values of each column, some rows at a time."""
    import pyarrow as arrow
    from pyarrow import parquet

    with open_bytes(file.path) as opened:
        if file.format == "parquet":
            table = parquet.ParquetFile(opened)
            _check_columns(file.path, table.schema_arrow.names, names)
            groups = list(range(table.num_row_groups))[file.begin : file.end]
            for batch in table.iter_batches(ROWS, columns=names, row_groups=groups):
                yield [batch.column(name).to_pylist() for name in names]
            return
        magic = opened.read(6)
        opened.seek(0)
        if magic == b"ARROW1":
            reader = arrow.ipc.open_file(opened)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            # The datasets library writes streams.
            reader = arrow.ipc.open_stream(opened)
            batches = iter(reader)
        _check_columns(file.path, reader.schema.names, names)
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS):
                yield [batch.column(name).slice(start, ROWS).to_pylist() for name in names]


def _check_columns(path: Path, columns: list[str], names: list[str]) -> None:
    """Raises InputError where a column is missing."""
    for name, option in zip(names, OPTIONS, strict=False):
        if name not in columns:
            found = ", ".join(map(ascii, columns[:8])) or "none"
            raise InputError(
                f'{path}: it has no column "{name}" but {found}; name it with {option}'
            )
