"""The list of incidents of a run.

Many ranks write whole lines, a torn end does not prevent reading, and a failed write stops nothing.
"""

from __future__ import annotations

import logging
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from megaconsa import run_folder
from megaconsa.incidents import read, record


def write_many(run: Path, rank: int) -> None:
    for step in range(200):
        record(run, "skipped", f"the loss of step {step} is nan", step=step, rank=rank)


def test_many_ranks_write_whole_lines(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3) as ranks:
        list(ranks.map(write_many, [tmp_path] * 3, range(3)))
    entries = read(tmp_path)
    assert len(entries) == 600
    assert len((tmp_path / run_folder.INCIDENTS).read_text().splitlines()) == 600
    for rank in range(3):
        assert [entry["step"] for entry in entries if entry["rank"] == rank] == list(range(200))


def test_a_torn_or_missing_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    record(tmp_path, "hang", "no step for 300 s", step=7, rank=0)
    with (tmp_path / run_folder.INCIDENTS).open("a") as file:
        file.write('{"step": 4}\n{"time": "20')
    (entry,) = read(tmp_path)
    assert (entry["kind"], entry["step"], entry["rank"], entry["text"]) == (
        "hang",
        7,
        0,
        "no step for 300 s",
    )


def test_what_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "megaconsa"):
        record(tmp_path / "nowhere", "error", "a planted error", step=None, rank=1)
    assert "it would have said: a planted error" in caplog.text
