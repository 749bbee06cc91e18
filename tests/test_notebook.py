"""The notebook runs from top to bottom on an export, and shows a picture and a text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.exports import ALLOCATIONS, make_export

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
QUICKSTART = ROOT / "runs" / "quickstart" / "hf"
SHOW = """
import matplotlib.pyplot as plt
def show():
    plt.savefig("shown.png")
plt.show = show
"""
"""Jupyter shows a figure below its cell. Here it becomes a file."""


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_draws_the_allocation_and_writes_a_text(
    small_data: Path, tmp_path: Path
) -> None:
    """It takes the quickstart's export if `make quickstart` has run here, else a tiny one."""
    export = QUICKSTART
    if not export.is_dir():
        export = make_export(tmp_path / "hf", ALLOCATIONS["heads"], small_data / "tokenizer")
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join([SHOW, *code_cells()])],
        cwd=tmp_path,
        env=os.environ | {"EXPORT": str(export), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "KV heads keep full attention" in ended.stdout
    assert "of the cache of a dense model" in ended.stdout
    assert "def __init__(self" in ended.stdout
    assert (tmp_path / "shown.png").stat().st_size > 2000


def test_the_notebook_is_stored_as_jupyter_writes_it() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert {"cell_type", "id", "metadata", "source"} <= cell.keys()
