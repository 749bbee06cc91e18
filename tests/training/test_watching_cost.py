"""Watching a run costs less than a hundredth of its steps, although these steps are small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megaconsa.benchmarks.watching import measure
from megaconsa.config import build


def test_watching_costs_less_than_a_hundredth(make_config: Callable[..., dict[str, Any]]) -> None:
    values = make_config(
        training={"steps": 1000, "micro_batch": 4, "global_batch": 16},
        checkpoint={"every": 0},
        allocation={"source": "rule", "rule": "dense"},
    )
    watchers, whole = measure(build(values), steps=30, warm_up=5)
    assert {"Watchdog", "StopSignals", "StopFile", "bad steps"} <= watchers.keys()
    assert sum(watchers.values()) < 0.01 * whole, {
        name: f"{seconds / whole:.3%}" for name, seconds in watchers.items()
    }
