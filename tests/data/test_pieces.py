"""Pieces of files hold the documents of the files, each once and in order."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as arrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megaconsa.data import pieces
from megaconsa.data.bad_documents import BadDocuments
from megaconsa.data.documents import Layout
from megaconsa.data.pieces import Piece, cut
from megaconsa.data.sources import SourceFile, find_files
from megaconsa.errors import InputError
from tests.support.texts import read_texts


def documents_of(found: list[Piece]) -> list[str]:
    return [text for piece in found for text in read_texts(piece.files)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=30)), size=st.integers(1, 200))
def test_lines_are_read_once_wherever_a_file_is_cut(
    texts: list[str], size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    monkeypatch.setattr(pieces, "PIECE_BYTES", size)
    found = list(cut([SourceFile(file, "lines")]))
    assert documents_of(found) == texts
    assert sum(piece.size for piece in found) == file.stat().st_size
    if file.stat().st_size > size:
        assert len(found) > 1


def test_row_groups_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {i} " * 20 for i in range(100)]
    file = tmp_path / "text.parquet"
    parquet.write_table(arrow.table({"text": texts}), file, row_group_size=7)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    found = list(cut([SourceFile(file, "parquet")]))
    assert len(found) > 3
    assert documents_of(found) == texts


def test_small_files_share_a_piece_of_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("a", "b"):
        (tmp_path / source).mkdir()
        for i in range(10):
            (tmp_path / source / f"{i}.txt").write_text(f"{source}{i}" * 50)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 300)
    files = find_files([str(tmp_path / "a"), str(tmp_path / "b")]).files
    found = list(cut(files))
    assert [file for piece in found for file in piece.files] == files
    assert len(found) == 8
    assert {piece.source for piece in found} == {str(tmp_path / "a"), str(tmp_path / "b")}


def test_a_bad_line_or_row_of_a_part_is_named_by_its_place_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    lines = [json.dumps({"text": f"text {i}"}) for i in range(500)]
    lines[333] = "{"
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(lines))
    bad = BadDocuments(1)
    found = list(cut([SourceFile(file, "lines")]))
    texts = [text for piece in found for text in read_texts(piece.files, bad=bad)]
    assert len(texts) == 499
    assert bad.first[0].startswith(f"{file}, line 334: ")
    values = [f"text {i} " * 20 for i in range(100)]
    table = tmp_path / "text.parquet"
    rows = arrow.array([*values[:71], None, *values[72:]])
    parquet.write_table(arrow.table({"text": rows}), table, row_group_size=7)
    with pytest.raises(InputError, match="row 72: "):
        documents_of(list(cut([SourceFile(table, "parquet")])))


def test_the_name_of_a_piece_changes_with_its_files_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one")
    (piece,) = cut([SourceFile(file, "text")])
    name = piece.key([1])
    assert name == piece.key([1])
    assert name != piece.key([2])
    file.write_text("other")
    assert name != piece.key([1])


def test_texts_between_separators_are_the_documents(tmp_path: Path) -> None:
    texts = ["", "one", "two\n" * 1_000_000, "three"]
    (tmp_path / "text.txt").write_text("\ufeff" + "<|end|>".join(["zero", *texts]))
    files = [SourceFile(tmp_path / "text.txt", "text")]
    found = read_texts(files, Layout(separator="<|end|>"))
    assert found == ["zero", *texts[1:]]
