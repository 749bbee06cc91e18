"""The documents in source files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megaconsa.data.document import Document, Vocabulary
from megaconsa.data.formats import DAMAGE, INDEXED, open_bytes
from megaconsa.data.megatron_file import MegatronFile
from megaconsa.data.sources import SourceFile
from megaconsa.errors import InputError
from megaconsa.files import parse_json

if TYPE_CHECKING:
    from megaconsa.data.mds_documents import MdsDocuments

FIELD = "text"
"""The usual name of the field or column that holds a document."""
ROWS = 1024
"""Rows of a table that are read at a time."""
BLOCK_BYTES = 1 << 20
"""Bytes of a text file that are read at a time."""
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
    """The field of JSON lines, or the column of a table or of MDS, that holds a document."""
    separator: str | None = None
    """Text that divides a text file into documents. None: a text file is one document."""


def read_documents(
    files: Iterable[SourceFile],
    layout: Layout | None = None,
    bad: BadDocuments | None = None,
    vocabulary: Vocabulary | None = None,
) -> Iterator[Document]:
    """The documents. Empty ones are left out.

    Texts are exactly as stored. Ids end with one end-of-text token at least.

    bad: counts documents that cannot be read. None: the first one is refused.
    vocabulary: that of the documents that are ids. None: such documents are refused.

    Raises InputError, with file and place, for a bad document too many and for a damaged file.
    """
    layout = layout or Layout()
    bad = bad or BadDocuments()
    for file in files:
        with reading(file):
            if file.format in INDEXED:
                found = _indexed(file, layout, bad, vocabulary)
            else:
                found = map(Document, _texts(file, layout, bad))
            for document in found:
                if not document.is_empty:
                    yield document


def holds_ids(file: SourceFile, layout: Layout) -> bool:
    """Whether the documents of a file were tokenized elsewhere.

    Raises InputError where the file lacks the column that the layout names.
    """
    if file.format == "mds":
        from megaconsa.data import mds_documents

        assert file.index is not None
        return mds_documents.holds_ids(file.path, file.index, layout.field, FIELD)
    return file.format == "megatron"


@contextmanager
def reading(file: SourceFile) -> Iterator[None]:
    """Context in which a file is read. Raises InputError where it is damaged or out of reach."""
    try:
        yield
    except Exception as error:
        fault = _fault_of_file(file, error)
        if fault is None:
            raise
        raise InputError(f"{file.path}: {fault}") from error


def _fault_of_file(file: SourceFile, error: Exception) -> str | None:
    """What an error says about the file that was read, or None if it says nothing."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({os.strerror(error.errno)}), make it readable or leave it out"
    reason = str(error).split("\n", 1)[0]
    # bz2 and pyarrow report damage as an OSError, without a number.
    if isinstance(error, (*DAMAGE, OSError)):
        return f"the file is damaged ({reason}), download it again or leave it out"
    if file.format in ("parquet", "arrow"):
        # Imported here because most runs have no tables, and the import takes a while.
        import pyarrow as arrow

        if isinstance(error, arrow.ArrowException):
            return (
                f"the {file.format} file is damaged or none ({reason}), "
                "download it again or leave it out"
            )
    return None


def _indexed(
    file: SourceFile, layout: Layout, bad: BadDocuments, vocabulary: Vocabulary | None
) -> Iterator[Document]:
    """The documents of a file that has an index, or of a part of such a file."""
    opened = _open(file, layout)
    end = len(opened) if file.end is None else file.end
    for number in range(file.begin, end):
        try:
            document = opened.document(number)
            if document.ids is not None:
                if vocabulary is None:
                    raise InputError(f"{file.path}: its documents are ids, give their --tokenizer")
                document = document.ended(vocabulary)
        except ValueError as error:
            bad.add(f"{file.path}, document {number + 1}: {error}")
        else:
            yield document


def _open(file: SourceFile, layout: Layout) -> MegatronFile | MdsDocuments:
    """A file that has an index."""
    assert file.index is not None
    if file.format == "megatron":
        return MegatronFile(file.path, file.index)
    # Imported here because most sources have no such shards, and the import takes a while.
    from megaconsa.data.mds_documents import MdsDocuments

    return MdsDocuments(file.path, file.index, layout.field, FIELD)


def _texts(file: SourceFile, layout: Layout, bad: BadDocuments) -> Iterator[str]:
    if file.format == "lines":
        return _lines(file, layout.field, bad)
    if file.format == "text":
        return _text(file.path, layout.separator, bad)
    return _rows(file, layout.field, bad)


def _text(path: Path, separator: str | None, bad: BadDocuments) -> Iterator[str]:
    """The documents of a text file."""
    with open_bytes(path) as file:
        parts = [file.read()] if separator is None else _split(file, separator.encode())
        position = 0
        for part in parts:
            try:
                text = part.decode()
            except UnicodeDecodeError as error:
                place = position + error.start
                bad.add(f"{path}: not UTF-8 at byte {place}, convert the file or leave it out")
            else:
                # A byte-order mark may stand at the beginning of the file.
                yield text.removeprefix("\ufeff") if position == 0 else text
            position += len(part) + len((separator or "").encode())


def _split(file: IO[bytes], separator: bytes) -> Iterator[bytes]:
    """The parts of a file between the separators, without holding the whole file."""
    rest = b""
    while block := file.read(BLOCK_BYTES):
        *whole, rest = (rest + block).split(separator)
        yield from whole
    yield rest


def _lines(file: SourceFile, name: str, bad: BadDocuments) -> Iterator[str]:
    """The documents of a file with one JSON object a line, or of a part of such a file."""
    with open_bytes(file.path) as opened:
        position = file.begin
        if file.begin:
            # The line that begins before this part belongs to the part before.
            opened.seek(file.begin - 1)
            position = file.begin - 1 + len(opened.readline())
        for number, line in enumerate(opened, start=1):
            if file.end is not None and position >= file.end:
                return
            record, fault = _record(line, name, is_first=position == 0)
            position += len(line)
            if fault:
                place = _lines_before(file) + number
                bad.add(f"{file.path}, line {place}: {fault}")
            elif record is not None:
                yield record[name]


def _record(line: bytes, name: str, *, is_first: bool) -> tuple[Any, str | None]:
    """The record of a line, and what is wrong with it. Both are None for a blank line.

    is_first: whether it is the first line of its file, which may begin with a byte-order mark.
    """
    if not line.strip():
        return None, None
    try:
        record = parse_json(line.decode("utf-8-sig" if is_first else "utf-8"))
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 at byte {error.start} of the line"
    except ValueError:
        return None, "expected a JSON object, fix the line"
    return record, _fault_of_record(record, name)


def _lines_before(file: SourceFile) -> int:
    """The number of lines that begin before a part of a file.

    Parts are read without it. Only a bad line needs its number.
    """
    lines = 0
    left = file.begin
    with open_bytes(file.path) as opened:
        while left > 0:
            block = opened.read(min(left, BLOCK_BYTES))
            lines += block.count(b"\n")
            left -= len(block)
        ends_with_a_line = not file.begin or block.endswith(b"\n")
    return lines if ends_with_a_line else lines + 1


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
    row = 0
    try:
        for values in _columns(file, name):
            for value in values:
                row += 1
                if fault := _fault_of_text(value, f'column "{name}"'):
                    bad.add(f"{file.path}, row {_rows_before(file) + row}: {fault}")
                else:
                    yield value
    except UnicodeDecodeError as error:
        place = _rows_before(file) + row
        raise InputError(
            f'{file.path}, after row {place}: column "{name}" is not UTF-8 ({error.reason})'
        ) from error


def _rows_before(file: SourceFile) -> int:
    """The number of rows before a part of a table."""
    from pyarrow import parquet

    if not file.begin:
        return 0
    metadata = parquet.read_metadata(file.path)
    return sum(metadata.row_group(group).num_rows for group in range(file.begin))


def _columns(file: SourceFile, name: str) -> Iterator[list[Any]]:
    """The values of a column, some rows at a time."""
    import pyarrow as arrow
    from pyarrow import parquet

    with open_bytes(file.path) as opened:
        if file.format == "parquet":
            table = parquet.ParquetFile(opened)
            _check_column(file.path, table.schema_arrow.names, name)
            groups = list(range(table.num_row_groups))[file.begin : file.end]
            for batch in table.iter_batches(ROWS, columns=[name], row_groups=groups):
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
