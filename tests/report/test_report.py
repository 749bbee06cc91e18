"""The command report."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError
from megaconsa.report.page import write_report
from megaconsa.report.runs import find_runs
from megaconsa.reporting.metrics import last, read_metrics, series
from tests.support import ROOT


@pytest.fixture(scope="module")
def page(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(sample, tmp_path_factory.mktemp("page") / "report.html").read_text()


def test_sections_and_figures(page: str) -> None:
    assert re.findall(r"<h2>(\w+)<small>", page) == ["learn", "train"]
    titles = (
        "Loss of all runs",
        "P(z &gt; 0), step 300",
        "Which heads are full",
        "Sparsity",
        "Multipliers",
        "Evidence: 0 is noise",
        "Loss that opening a unit saves",
        "gap at the cut",
        "Tokens per second",
    )
    for title in titles:
        assert title in page
    # A legend for each run, and for both together.
    assert len(re.findall(r"</svg>unigram entropy", page)) == 3
    assert "training.learning_rate" in page


def test_page_is_self_contained(page: str) -> None:
    assert not re.search(r"https?:|//[a-z]", page)
    assert not re.search(r"<(script [^>]*src|link|iframe)", page)
    assert all(
        source.startswith(("data:", "#")) for source in re.findall(r'(?:href|src)="([^"]*)"', page)
    )
    # The page sets the colors of text and background, light or dark.
    assert "#010203" not in page
    assert "#fefdfc" not in page


def test_same_run_same_page(sample: Path, tmp_path: Path) -> None:
    pages = [
        write_report(sample / "train", tmp_path / name).read_text() for name in ("a.html", "b.html")
    ]
    assert pages[0] == pages[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_allocations_come_from_file_gates_or_rule(sample: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sample, folder)
    learn, train = find_runs(folder).runs
    assert learn.allocation is not None
    assert [sum(row) for row in learn.allocation.full] == [4] * 12
    assert train.allocation is not None
    assert train.allocation.origin == {"rule": "head-share"}
    finished = Allocation(128, ((True,) * 8,) * 12)
    finished.save(folder / "learn" / "allocation.json")
    assert find_runs(folder / "learn").runs[0].allocation == finished


def test_bare_metrics_suffice(tmp_path: Path) -> None:
    rows = [
        {"step": step, "loss": 5.0 - step, "mfu": None, "cut_margin": float("inf")}
        for step in range(1, 4)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "3.0000" in write_report(tmp_path).read_text()


def test_one_row_of_learning(sample: Path, tmp_path: Path) -> None:
    first = (sample / "learn" / "metrics.jsonl").read_text().splitlines()[0]
    (tmp_path / "metrics.jsonl").write_text(first + "\n")
    assert "learns its allocation" in write_report(tmp_path).read_text()


def test_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert series(rows, "loss")[1].tolist() == [2.5]
    assert last(rows, "loss") == 2.5
    assert last(rows, "absent") is None


@pytest.mark.parametrize(
    "line", [b'{"st', b'{"step": "\xff\xfe"}', b"\xff", b"[" * 5000, b"[]", b""]
)
def test_a_line_in_the_middle_that_is_no_row_is_left_out_with_a_warning(
    line: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    assert "line 2 is not a JSON object with a step" in caplog.text


def test_refusals_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="no step has ended"):
        write_report(tmp_path)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run" / "gates.json").write_text('{"step": 1}')
    with pytest.raises(InputError, match=r"gates\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.rglob("*.html*"))


def test_command_refuses_with_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "report.py", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
