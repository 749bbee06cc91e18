"""Which files of the sources are read, and in which order."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megaconsa.data.sources import find_files, python_sources
from megaconsa.errors import InputError
from tests.support.texts import read_texts


def test_python_sources_are_real_text_without_packages_and_tests() -> None:
    files = python_sources()
    assert files == python_sources()
    assert files != sorted(files)
    assert len(files) > 300
    assert not any({"site-packages", "test", "tests"} & set(file.parts) for file in files)
    assert sum(file.stat().st_size for file in files) > 5e6


def test_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep" / "b.md").write_text("b")
    (folder / "empty.py").write_text("")
    (folder / "picture.png").write_bytes(b"\xff\x00")
    other = tmp_path / "other.weird"
    other.write_text("other")
    found = find_files([str(folder), str(other)])
    texts = read_texts(found.files)
    assert sorted(texts[:2]) == ["a", "b"]
    assert texts[2:] == ["other"]
    assert [(file.path.name, file.reason) for file in found.skipped] == [
        ("picture.png", "its format is not known")
    ]


def lines(kind: str) -> bytes:
    return "".join(json.dumps({"text": f"{kind} {n}"}) + "\n" for n in range(10)).encode()


def test_a_folder_as_downloads_leave_it(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "plain-checkpoint.jsonl").write_bytes(lines("hidden"))
    (folder / ".hidden.jsonl").write_bytes(lines("hidden"))
    (folder / "plain.jsonl").write_bytes(lines("plain"))
    (folder / "gz.jsonl.gz").write_bytes(gzip.compress(lines("gz")))
    (folder / "c4-train.00000-of-01024.json").write_bytes(lines("json"))
    (folder / "UPPER.JSONL").write_bytes(lines("upper"))
    (folder / "part-00001").write_bytes(lines("nosuffix"))
    (folder / "README.md").write_text("# Dataset card")
    (folder / "LICENSE").write_text("Apache")
    (folder / "dataset_infos.json").write_text(json.dumps({"default": {"rows": 3}}, indent=1))
    linked = tmp_path / "other"
    linked.mkdir()
    (linked / "linked.jsonl").write_bytes(lines("linked"))
    (folder / "linked_folder").symlink_to("../other")
    (linked / "back").symlink_to("../mixed")

    found = find_files([str(folder)])
    texts = read_texts(found.files)
    kinds = ("plain", "gz", "json", "upper", "nosuffix", "linked")
    assert sorted(texts) == sorted(f"{kind} {n}" for kind in kinds for n in range(10))
    reasons = {file.path.name: file.reason for file in found.skipped}
    assert reasons == {
        "README.md": "it describes the data beside it",
        "LICENSE": "its format is not known",
        "dataset_infos.json": "its format is not known",
    }


def test_a_card_among_text_is_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "a.txt").write_text("a")
    found = find_files([str(tmp_path)])
    assert sorted(read_texts(found.files)) == ["a", "card"]
    assert found.skipped == []


def test_bad_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        find_files([str(tmp_path / "missing")])
    with pytest.raises(InputError, match="holds no files of documents"):
        find_files([str(tmp_path)])
    file = tmp_path / "whole.json"
    file.write_text(json.dumps([{"text": "x"}], indent=1))
    with pytest.raises(InputError, match=r"whole.json: expected one JSON object a line"):
        find_files([str(file)])
