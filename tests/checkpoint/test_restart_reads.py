"""The benchmark of restarts reads every byte of weights and moments, each on one rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.benchmarks import restarting
from tests.support.comparison import checkpoint


def test_ranks_together_read_the_checkpoint_once(
    make_config: Callable[..., dict[str, Any]],
    train: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = make_config()
    train(values)
    saved = checkpoint(Path(values["run"]["dir"]), 6)
    ranks = [(tp, dp) for tp in range(2) for dp in range(3)]
    read = sum(restarting.load(saved, (tp, 2), (dp, 3)) for tp, dp in ranks)
    shapes = saved.weight_shapes()
    # Norms are whole on both tensor ranks.
    norms = sum(math.prod(shape) for name, shape in shapes.items() if "norm" in name)
    assert read == 12 * (sum(map(math.prod, shapes.values())) + norms)
    monkeypatch.setattr("sys.argv", ["restarting", str(saved.path), "2", "3", "4"])
    restarting.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["ranks", "0-3", "4-5"]
