"""The documents in source files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaconsa.data.formats import DAMAGE, open_bytes
from megaconsa.data.sources import SourceFile
from megaconsa.errors import InputError
from megaconsa.files import parse_json

FIELD = "text"
"""The usual name of the field or column that holds a document."""
ROWS = 1024
"""Rows of a table that are read at a time."""
NAMED = 3
"""How many bad documents are named."""


@dataclass
class BadDocuments:
    """Counts the documents that cannot be read, and refuses more than the user allows."""

    limit: int = 0
    """How many of them are skipped."""
    count: int = 0
    first: list[str] = field(default_factory=list)
    """What is wrong with the first few, each with its file and place."""

    def add(self, fault: str) -> None:
        """Counts a bad document. Raises InputError if it is one too many."""
        self.count += 1
        if self.count > self.limit:
            if self.limit:
                fault += f"; it is the bad document number {self.count} of at most {self.limit}"
            raise InputError(fault)
        if len(self.first) < NAMED:
            self.first.append(fault)


@dataclass(frozen=True)
class Layout:
    """Where the documents are in their files."""

    field: str = FIELD
    """The field of JSON lines, or the column of a table, that holds a document."""
    separator: str | None = None
    """Text that divides a text file into documents. None: a text file is one document."""


def read_documents(
    files: Iterable[SourceFile],
    layout: Layout | None = None,
    bad: BadDocuments | None = None,
) -> Iterator[str]:
    """The documents, exactly as stored. Empty ones are left out.

    bad: counts documents that cannot be read. None: the first one is refused.

    Raises InputError, with file and place, for a bad document too many and for a damaged file.
    """
    layout = layout or Layout()
    bad = bad or BadDocuments()
    for file in files:
        try:
            for text in _documents_of(file, layout, bad):
                if text:
                    yield text
        except (*DAMAGE, OSError) as error:
            # bz2 and pyarrow report damage as an OSError, without a number.
            number = error.errno if isinstance(error, OSError) else None
            if number is None:
                reason = str(error).split("\n", 1)[0]
                fault = f"the file is damaged ({reason}), download it again or leave it out"
            else:
                fault = f"cannot be read ({os.strerror(number)}), make it readable or leave it out"
            raise InputError(f"{file.path}: {fault}") from error


def _documents_of(file: SourceFile, layout: Layout, bad: BadDocuments) -> Iterator[str]:
    if file.format == "lines":
        return _lines(file.path, layout.field, bad)
    if file.format == "text":
        return _text(file.path, layout.separator, bad)
    return _rows(file, layout.field, bad)


def _text(path: Path, separator: str | None, bad: BadDocuments) -> Iterator[str]:
    """The documents of a text file."""
    with open_bytes(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad.add(f"{path}: not UTF-8 at byte {error.start}, convert the file or leave it out")
        return
    if separator is None:
        yield text
    else:
        yield from text.split(separator)


def _lines(path: Path, name: str, bad: BadDocuments) -> Iterator[str]:
    """The documents of a file with one JSON object a line."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # A byte-order mark may stand at the beginning of the file.
                record = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                bad.add(f"{path}, line {number}: not UTF-8 at byte {error.start} of the line")
                continue
            except ValueError:
                bad.add(f"{path}, line {number}: expected a JSON object, fix the line")
                continue
            if fault := _fault_of_record(record, name):
                bad.add(f"{path}, line {number}: {fault}")
            else:
                yield record[name]


def _fault_of_record(record: Any, name: str) -> str | None:
    """What is wrong with a JSON record, or None."""
    if not isinstance(record, dict):
        return "expected a JSON object, fix the line"
    if name not in record:
        # Surrogates would not print.
        others = ", ".join(ascii(key) for key in list(record)[:8]) or "none"
        return f'it has no field "{name}" but {others}; name the field with --field'
    return _fault_of_text(record[name], f'field "{name}"')


def _fault_of_text(text: object, place: str) -> str | None:
    if not isinstance(text, str):
        return f"{place} is {type(text).__name__}, make it a string"
    try:
        # JSON can spell half a surrogate pair, which UTF-8 cannot hold.
        text.encode()
    except UnicodeEncodeError:
        return f"{place} has half a surrogate pair, fix it"
    return None


def _rows(file: SourceFile, name: str, bad: BadDocuments) -> Iterator[str]:
    """The documents of a Parquet or Arrow file, read some rows at a time."""
    # Imported here because most runs have no tables, and the import takes a while.
    import pyarrow as arrow

    row = 0
    try:
        for values in _columns(file, name):
            for value in values:
                row += 1
                if fault := _fault_of_text(value, f'column "{name}"'):
                    bad.add(f"{file.path}, row {row}: {fault}")
                else:
                    yield value
    except UnicodeDecodeError as error:
        raise InputError(
            f'{file.path}, after row {row}: column "{name}" is not UTF-8 ({error.reason})'
        ) from error
    except arrow.ArrowException as error:
        reason = str(error).split("\n", 1)[0]
        raise InputError(
            f"{file.path}: the {file.format} file is damaged or none ({reason}), "
            "download it again or leave it out"
        ) from error


def _columns(file: SourceFile, name: str) -> Iterator[list[Any]]:
    """The values of a column, some rows at a time."""
    import pyarrow as arrow
    from pyarrow import parquet

    with open_bytes(file.path) as opened:
        if file.format == "parquet":
            table = parquet.ParquetFile(opened)
            _check_column(file.path, table.schema_arrow.names, name)
            for batch in table.iter_batches(ROWS, columns=[name]):
                yield batch.column(0).to_pylist()
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
        _check_column(file.path, reader.schema.names, name)
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS):
                yield batch.column(name).slice(start, ROWS).to_pylist()


def _check_column(path: Path, columns: list[str], name: str) -> None:
    """Raises InputError where the column is missing."""
    if name not in columns:
        found = ", ".join(map(ascii, columns[:8])) or "none"
        raise InputError(f'{path}: it has no column "{name}" but {found}; name it with --field')
