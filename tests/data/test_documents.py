"""Documents of source files: content, formats and refusals."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet

from megaconsa.data import tables
from megaconsa.data.bad_documents import BadDocuments
from megaconsa.data.documents import Layout
from megaconsa.data.sources import SourceFile, find_files
from megaconsa.errors import InputError
from tests.support.texts import read_texts

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXTS = [f"document {i} é \n" * (i + 1) for i in range(20)]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstd.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 3, field: text}) + "\n" for text in texts).encode()


def read(file: Path, **options: object) -> list[str]:
    layout = Layout(**options)  # type: ignore[arg-type]
    return read_texts(find_files([str(file)]).files, layout)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL", ".json", "", ".part-00001"])
def test_json_lines_by_any_name(tmp_path: Path, suffix: str, compression: str) -> None:
    file = tmp_path / f"x{suffix}{compression}"
    file.write_bytes(COMPRESSIONS[compression](json_lines([*TEXTS, ""])))
    assert read(file) == TEXTS
    # The content alone says that it is compressed.
    renamed = tmp_path / f"renamed{suffix}"
    file.rename(renamed)
    assert read(renamed) == TEXTS


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_text(tmp_path: Path, compression: str) -> None:
    file = tmp_path / f"x.txt{compression}"
    file.write_bytes(COMPRESSIONS[compression]("\ufeffé\r\n".encode()))
    assert read(file) == ["é\r\n"]


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
def test_all_parts_of_a_concatenated_file_are_read(tmp_path: Path, compression: str) -> None:
    """Tools that compress in parallel write many streams one after another."""
    compress = COMPRESSIONS[compression]
    file = tmp_path / f"x.jsonl{compression}"
    file.write_bytes(compress(json_lines(TEXTS[:7])) + compress(json_lines(TEXTS[7:])))
    assert read(file) == TEXTS


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_compressed_files_are_refused(
    tmp_path: Path, compression: str, damage: str
) -> None:
    data = bytearray(COMPRESSIONS[compression](json_lines(TEXTS)))
    if damage == "truncated":
        del data[-20:]
    else:
        data[len(data) // 2] ^= 255
    file = tmp_path / f"x.jsonl{compression}"
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"x.jsonl\S*(: the file is damaged|, line \d+)"):
        read(file)


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_tables(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS", 3)
    table = arrow.table({"id": list(range(20)), "content": TEXTS})
    file = tmp_path / "x"
    if kind == "parquet":
        parquet.write_table(table, file, row_group_size=7)
    else:
        new = arrow.ipc.new_file if kind == "file" else arrow.ipc.new_stream
        # A stream shows its format only in the name.
        file = file if kind == "file" else tmp_path / "x.arrow"
        with new(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    assert read(file, field="content") == TEXTS
    with pytest.raises(InputError, match="it has no column \"text\" but 'id', 'content'; name it"):
        read(file)
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"x.*: the .*file is damaged"):
        read(file, field="content")


def test_a_table_may_lack_some_documents(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    parquet.write_table(arrow.table({"text": ["a", None, "b"]}), file)
    with pytest.raises(InputError, match='row 2: column "text" is NoneType'):
        read(file)
    bad = BadDocuments(limit=1)
    assert read_texts([SourceFile(file, "parquet")], bad=bad) == ["a", "b"]
    assert bad.count == 1


def test_text_may_hold_several_documents(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("one\n<|endoftext|>two<|endoftext|>")
    assert read(file, separator="<|endoftext|>") == ["one\n", "two"]
    assert read(file) == ["one\n<|endoftext|>two<|endoftext|>"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected a JSON object"),
        ("[1]", "line 2: expected a JSON object"),
        ('{"content": "x"}', "line 2: it has no field \"text\" but 'content'; name the field"),
        ('{"text": 3}', 'line 2: field "text" is int'),
        ('{"text": "\\ud800"}', 'line 2: field "text" has half a surrogate pair'),
        ("\udcff", "line 2: not UTF-8 at byte 0"),
    ],
)
def test_bad_lines_are_refused_or_counted(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "x.jsonl"
    lines = ['{"text": "fine"}', line, '{"text": "also"}', line, ""]
    file.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=f"x.jsonl, {message}"):
        read(file)
    files = [SourceFile(file, "lines")]
    bad = BadDocuments(limit=2)
    assert read_texts(files, bad=bad) == ["fine", "also"]
    assert bad.count == 2
    assert len(bad.first) == 2
    with pytest.raises(InputError, match=r"line 4: .*; it is the bad document number 2 of at most"):
        read_texts(files, bad=BadDocuments(limit=1))


def test_text_in_another_encoding_is_refused_or_counted(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("größe".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.txt: not UTF-8 at byte 2"):
        read(file)
    bad = BadDocuments(limit=1)
    assert read_texts([SourceFile(file, "text")], bad=bad) == []
    assert bad.count == 1
