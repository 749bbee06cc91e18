"""`megaconsa sweep`: the list of trials, single entries, and refusals.

Whole studies are in tests/study.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ARMS = {"dense": {"rule": "dense"}, "learned": {"learn": {}, "scope": "global", "seeds": [0]}}


@pytest.fixture
def study(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    base = make_config(allocation={"source": "rule", "rule": "dense"}, training={"steps": 3})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    values = {
        "config": "base.yaml",
        "learn": {"training.steps": 6},
        "train": {"training.steps": 2},
        "sparsities": [0.5, 0.75],
        "arms": ARMS,
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_list_numbers_the_trials(study: Path, tmp_path: Path, done: Callable[..., str]) -> None:
    said = done("sweep", study, "--out", tmp_path / "out", "--list")
    listed = [line.split() for line in said.splitlines()]
    assert listed == [["0", "dense-seed0"], ["1", "learned-0.5-seed0"], ["2", "learned-0.75-seed0"]]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_entries_one_by_one_then_the_table(
    study: Path,
    tmp_path: Path,
    done: Callable[..., str],
    refused: Callable[..., str],
) -> None:
    """Runs the entries like the tasks of a Slurm array."""
    out = tmp_path / "out"
    assert "needs the start checkpoint" in refused("sweep", study, "--out", out, "--only", "1")
    assert not out.exists()
    done("sweep", study, "--out", out, "--only", "start")
    assert "2/2 train-dense-seed0" not in done("sweep", study, "--out", out, "--only", "1")
    done("sweep", study, "--out", out, "--only", "0")
    assert not (out / "results.json").exists()
    assert "learned-0.75-seed0" in done("sweep", study, "--out", out)
    assert (out / "results.json").exists()


@pytest.mark.parametrize("entry", ["3", "-1", "first"])
def test_an_entry_that_is_not_listed(
    entry: str,
    study: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    said = refused("sweep", study, "--out", tmp_path / "out", f"--only={entry}")
    assert f"--only {entry} is not an entry; choose start, or 0 to 2 of --list" in said


def test_missing_data_are_refused_before_anything_runs(
    study: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    base["data"]["path"] = str(tmp_path / "none")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    assert str(tmp_path / "none") in refused("sweep", study, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
