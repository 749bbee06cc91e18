"""The documents in source files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megaconsa.data.bad_documents import OPTIONS, BadDocuments, fault_of_text
from megaconsa.data.document import Document, Vocabulary
from megaconsa.data.formats import DAMAGE, INDEXED, open_bytes
from megaconsa.data.megatron_file import MegatronFile
from megaconsa.data.sources import SourceFile
from megaconsa.data.tables import table_rows
from megaconsa.errors import InputError
from megaconsa.files import parse_json

if TYPE_CHECKING:
    from megaconsa.data.mds_documents import MdsDocuments

FIELD = "text"
"""The usual name of the field or column that holds a document."""
BLOCK_BYTES = 1 << 20
"""Bytes of a text file that are read at a time."""


@dataclass(frozen=True)
class Layout:
    """Where the documents are in their files."""

    field: str = FIELD
    """The field of JSON lines, or the column of a table or of MDS, that holds a document."""
    separator: str | None = None
    """Text that divides a text file into documents. None: a text file is one document."""
    prompt: str | None = None
    """The field or column of the text before a document, which is not predicted. None: there is
    none."""

    @property
    def fields(self) -> list[str]:
        """The fields that are read: the document's, and the prompt's if there is one."""
        return [self.field] if self.prompt is None else [self.field, self.prompt]


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
                found = _texts(file, layout, bad)
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


def has_fields(file: SourceFile, layout: Layout) -> bool:
    """Whether the documents of a file are texts in fields, so that others may stand beside them.

    Raises as `holds_ids` does.
    """
    return file.format != "text" and not holds_ids(file, layout)


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
        return MegatronFile(file.path, file.index, file.begin, file.end)
    # Imported here because most sources have no such shards, and the import takes a while.
    from megaconsa.data.mds_documents import MdsDocuments

    return MdsDocuments(file.path, file.index, layout.field, FIELD, layout.prompt)


def _texts(file: SourceFile, layout: Layout, bad: BadDocuments) -> Iterator[Document]:
    if file.format == "text":
        return map(Document, _text(file.path, layout.separator, bad))
    records = _lines if file.format == "lines" else table_rows
    return (_document(values) for values in records(file, layout.fields, bad))


def _document(values: Sequence[str]) -> Document:
    """The document of the values of the layout's fields."""
    text, *prompt = values
    return Document(text, prompt=prompt[0] if prompt else None)


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


def _lines(file: SourceFile, names: list[str], bad: BadDocuments) -> Iterator[list[str]]:
    """The fields of each object of a file with one a line, or of a part of such a file."""
    with open_bytes(file.path) as opened:
        position = file.begin
        if file.begin:
            # The line that begins before this part belongs to the part before.
            opened.seek(file.begin - 1)
            position = file.begin - 1 + len(opened.readline())
        for number, line in enumerate(opened, start=1):
            if file.end is not None and position >= file.end:
                return
            record, fault = _record(line, names, is_first=position == 0)
            position += len(line)
            if fault:
                place = _lines_before(file) + number
                bad.add(f"{file.path}, line {place}: {fault}")
            elif record is not None:
                yield [record[name] for name in names]


def _record(line: bytes, names: list[str], *, is_first: bool) -> tuple[Any, str | None]:
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
    return record, _fault_of_record(record, names)


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


def _fault_of_record(record: Any, names: list[str]) -> str | None:
    """What is wrong with a JSON record, or None."""
    if not isinstance(record, dict):
        return "expected a JSON object, fix the line"
    for name, option in zip(names, OPTIONS, strict=False):
        if name not in record:
            # Surrogates would not print.
            others = ", ".join(ascii(key) for key in list(record)[:8]) or "none"
            return f'it has no field "{name}" but {others}; name the field with {option}'
        if fault := fault_of_text(record[name], f'field "{name}"'):
            return fault
    return None
