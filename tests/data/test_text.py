"""Document sources: their order, content and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaconsa.data.text import find_files, python_sources, read_documents
from megaconsa.errors import InputError


def test_python_sources_are_real_text_without_packages_and_tests() -> None:
    files = python_sources()
    assert files == python_sources()
    assert files != sorted(files)
    assert len(files) > 300
    assert not any({"site-packages", "test", "tests"} & set(file.parts) for file in files)
    assert sum(file.stat().st_size for file in files) > 5e6


def test_files_folders_and_jsonl(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffé\r\n".encode())
    (folder / "deep" / "b.md").write_text("b")
    (folder / "empty.py").write_text("")
    (folder / "picture.png").write_bytes(b"\xff\x00")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        "\n".join(json.dumps({"text": text, "id": 3}) for text in ("one", "", "two\n")) + "\n\n"
    )
    other = tmp_path / "other.weird"
    other.write_text("other")
    documents = list(read_documents(find_files([str(folder), str(lines), str(other)])))
    assert sorted(documents[:2]) == ["b", "é\r\n"]
    assert documents[2:] == ["one", "two\n", "other"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected a JSON object"),
        ("[1]", "line 2: expected a JSON object"),
        ('{"content": "x"}', 'line 2: expected a JSON object with a field "text"'),
        ('{"text": 3}', 'line 2: field "text" is int'),
        ('{"text": "\\ud800"}', "line 2: .* surrogate"),
    ],
)
def test_bad_lines_are_refused(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"x.jsonl, {message}"):
        list(read_documents([file]))


def test_bad_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        find_files([str(tmp_path / "missing")])
    with pytest.raises(InputError, match="holds no text files"):
        find_files([str(tmp_path)])
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.txt: not UTF-8 at byte 2"):
        list(read_documents(find_files([str(tmp_path)])))
