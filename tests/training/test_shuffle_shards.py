"""A run that mixes some shards at a time keeps doing so when it resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.config import build
from megaconsa.errors import InputError
from megaconsa.training.same_run import check_same_run

MakeConfig = Callable[..., dict[str, Any]]
Train = Callable[[dict[str, Any]], list[dict[str, Any]]]


def test_the_order_belongs_to_the_run(
    make_config: MakeConfig, train: Train, tmp_path: Path
) -> None:
    def values(name: str, shuffle_shards: int | None) -> dict[str, Any]:
        return make_config(
            run={"dir": str(tmp_path / name)},
            allocation={"source": "rule", "rule": "dense"},
            training={"steps": 2},
            data={"shuffle_shards": shuffle_shards},
        )

    windowed = train(values("windowed", 2))
    mixed = train(values("mixed", None))
    assert windowed[0]["loss"] != mixed[0]["loss"]
    with pytest.raises(InputError, match=r"data.shuffle_shards: 2 -> 3"):
        train(values("windowed", 3))


@pytest.mark.parametrize(("old", "new"), [(None, 0), (0, None), (None, None), (8, 8)])
def test_null_and_0_are_the_same_order(
    make_config: MakeConfig, old: int | None, new: int | None
) -> None:
    before = make_config(data={"shuffle_shards": old})
    assert check_same_run(build(make_config(data={"shuffle_shards": new})), before) == []


def test_a_run_of_an_earlier_version_mixed_all(make_config: MakeConfig) -> None:
    assert check_same_run(build(make_config()), make_config()) == []
    with pytest.raises(InputError, match=r"data.shuffle_shards: 0 -> 8"):
        check_same_run(build(make_config(data={"shuffle_shards": 8})), make_config())
