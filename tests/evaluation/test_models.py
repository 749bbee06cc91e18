"""Labels and digests of the models to evaluate."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.evaluation.models import digest, open_models
from tests.support.exports import ALLOCATIONS, SHAPE, make_export


def test_labels(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may have "=" in its name.

    A folder without a label is called by its own name, wherever the command runs.
    """
    make_export(tmp_path / "lr=0.1" / "hf", ALLOCATIONS["heads"], None)
    monkeypatch.chdir(tmp_path / "lr=0.1" / "hf")
    info = DatasetInfo.load(small_data)
    named = [f"{tmp_path}/lr=0.1/hf", "a model=.", f"b={tmp_path}/lr=0.1/hf"]
    models = open_models(named, small_data, info)
    assert [model.label for model in models] == ["hf", "a model", "b"]
    assert [model.label for model in open_models(["."], small_data, info)] == ["hf"]
    assert len({model.digest for model in models}) == 1
    assert {(model.window, model.sparsity, model.max_positions) for model in models} == {
        (8, 0.5, SHAPE.max_position_embeddings)
    }


def test_digest_changes_with_the_model_alone(tmp_path: Path) -> None:
    folder = make_export(tmp_path / "hf", ALLOCATIONS["dense"], None)
    before = digest(folder)
    (folder / "README.md").write_text("another card")
    assert digest(folder) == before
    os.utime(folder / "model.safetensors", ns=(0, 0))
    touched = digest(folder)
    assert touched != before
    config = folder / "config.json"
    config.write_text(config.read_text().replace("1e-05", "1e-06"))
    assert digest(folder) not in (before, touched)
