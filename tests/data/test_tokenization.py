"""Preparation in several processes: the same data for any number, continued after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaconsa.data import PIECES, pieces, tokenization
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.shards import verify
from megaconsa.errors import InputError, RunError
from tests.data.conftest import make_documents
from tests.data.test_prepare import contents

SCRIPT = """
import os, sys
from pathlib import Path
from megaconsa.data import pieces, prepare, tokenization
from megaconsa.data.preparation_options import Options
from megaconsa.console import guarded
pieces.PIECE_BYTES = 20000
{patch}
options = Options(sequence_length=32, validation_share=0.1, workers=1)
guarded(lambda: prepare.prepare(
    [{source!r}], Path({out!r}), options, tokenizer=Path({tokenizer!r})
))
"""
KILLING = """
begin = tokenization._tokenize_piece
names = []
def killing(folder, name):
    names.append(name)
    if len(names) == 4:
        os.kill(os.{victim}(), 9)
    return begin(folder, name)
tokenization._tokenize_piece = killing
"""
KILLED = KILLING.format(victim="getppid")
DEAD = KILLING.format(victim="getpid")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(300, 7)))
    return file


def run(source: Path, out: Path, tokenizer: Path, patch: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(patch=patch, source=str(source), out=str(out), tokenizer=str(tokenizer))
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )


def prepared(source: Path, out: Path, tokenizer: Path, **options: object) -> DatasetInfo:
    chosen = Options(sequence_length=32, validation_share=0.1, **options)  # type: ignore[arg-type]
    return prepare([str(source)], out, chosen, tokenizer=tokenizer)


@pytest.mark.usefixtures("small_pieces")
def test_the_data_do_not_depend_on_the_number_of_processes(
    source: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(source, tmp_path / "three", tokenizer_folder, workers=3)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10_000_000)
    prepared(source, tmp_path / "one", tokenizer_folder, workers=1)
    prepared(source, tmp_path / "threads", tokenizer_folder, workers=4)
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "three") == expected
    assert contents(tmp_path / "threads") == expected
    assert "TOKENIZERS_PARALLELISM" not in os.environ


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("patch", "code"), [(KILLED, -9), (DEAD, 1)], ids=["killed", "dead"])
def test_the_same_command_continues(
    patch: str, code: int, source: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = run(source, out, tokenizer_folder, patch)
    assert first.returncode == code
    if code == 1:
        assert "error: a process that tokenizes was killed" in first.stderr
        assert "tokenized pieces stay in" in first.stdout
    done = {file.name: file.stat().st_mtime_ns for file in (out / PIECES).glob("*.json")}
    assert len(done) >= 3
    # A file that did not change is not tokenized again, also by another number of processes.
    began: list[str] = []
    submit = tokenization._Pool.submit

    def counted(pool: tokenization._Pool, folder: Path, name: str) -> object:
        began.append(name)
        return submit(pool, folder, name)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenization._Pool, "submit", counted)
        prepared(source, out, tokenizer_folder, workers=2)
    assert not {f"{name}.json" for name in began} & set(done)
    assert verify(out) == []
    assert not (out / PIECES).exists()
    prepared(source, tmp_path / "whole", tokenizer_folder)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_pieces")
def test_pieces_of_a_changed_file_are_tokenized_again(
    source: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(source, out, tokenizer_folder, KILLED).returncode == -9
    text = source.read_text().splitlines()
    text[0] = json.dumps({"text": "another beginning"})
    source.write_text("\n".join(text))
    prepared(source, out, tokenizer_folder)
    prepared(source, tmp_path / "whole", tokenizer_folder)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_pieces")
def test_bad_documents_are_counted_over_all_pieces(
    source: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    text = source.read_text().splitlines()
    for line in (3, 150, 280):
        text[line] = "{"
    source.write_text("\n".join(text))
    with pytest.raises(InputError, match=r"text\.jsonl, line (4|151|281): expected a JSON object"):
        prepared(source, tmp_path / "none", tokenizer_folder, workers=1)
    with pytest.raises(InputError, match=r"3 documents are bad, of at most 2; the first: .*line 4"):
        prepared(source, tmp_path / "two", tokenizer_folder, skip_bad=2)
    info = prepared(source, tmp_path / "three", tokenizer_folder, skip_bad=3)
    assert (info.source.documents, info.source.bad_documents) == (297, 3)
    assert info.sources[0].bad_documents == 3


def test_a_dead_process_is_a_run_error(
    source: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "PieceWriter", lambda *_: os._exit(1))
    with pytest.raises(RunError, match="a process that tokenizes was killed"):
        prepared(source, tmp_path / "out", tokenizer_folder)
    assert not (tmp_path / "out").exists()
