"""Small studies on real data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa.study import settings
from megaconsa.study.runs import Runs

ARMS: dict[str, Any] = {
    "dense": {"rule": "dense", "seeds": [0, 1]},
    "all-windowed": {"rule": "all-swa"},
    "random": {"rule": "random", "scope": "global", "draws": [3, 4]},
    "leave-one-out": {"score": "leave-one-out", "scope": "global", "options": {"sequences": 4}},
    "evidence": {"learn": {"gates.controller": "evidence"}, "scope": "global", "seeds": [0, 1]},
}


@pytest.fixture
def write_study(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Writes a study of a tiny model and its run configuration.

    Keyword arguments replace fields of the study.
    """

    def write(**fields: Any) -> Path:
        base = make_config(
            allocation={"source": "rule", "rule": "dense"},
            model={"num_hidden_layers": 2, "vocab_size": 512},
            training={"steps": 12},
            checkpoint={"every": 0},
        )
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        values = {
            "config": "base.yaml",
            "learn": {"training.steps": 24, "gates.warmup_steps": 8},
            "train": {"training.steps": 4},
            "sparsities": [0.5],
            "arms": copy.deepcopy(ARMS),
        }
        values.update(fields)
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def make_runs(write_study: Callable[..., Path], tmp_path: Path) -> Callable[..., Runs]:
    """Returns the runs of a study with changed fields.

    The `out` of the study is tmp_path/out.
    """

    def make(**fields: Any) -> Runs:
        return Runs(settings.load(write_study(**fields)), tmp_path / "out")

    return make
