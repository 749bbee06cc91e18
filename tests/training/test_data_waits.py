"""A run that waits for its data says so once, with the cause. Other runs do not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaconsa import incidents
from megaconsa.data.read_cost import ReadCost
from megaconsa.data.stream import BatchStream
from megaconsa.data.token_shards import TokenShards
from megaconsa.reporting.metrics import read_metrics
from megaconsa.training.callbacks import data_waits
from megaconsa.training.callbacks.data_waits import BLOCK_STEPS, Waits, bound_by_data, cause
from tests.support.ranks import ended, start, write

MakeConfig = Callable[..., dict[str, Any]]
STEPS = 9
FIRST_WARNING = 8
"""The earliest step that can warn, with the fixture `soon` and in SLOW_STORAGE."""
SLOW_STORAGE = """
import sys, time
from megaconsa.data.token_shards import TokenShards
from megaconsa.train import _main
from megaconsa.training.callbacks import data_waits

data_waits.WARM_UP_STEPS = 2
data_waits.BLOCK_STEPS = 2
data_waits.BLOCKS = 3
data_waits.LONGEST_PAUSE = 1000.0
rows = TokenShards.rows
def slowed(shards, ids):
    time.sleep(SECONDS)
    return rows(shards, ids)
TokenShards.rows = slowed
sys.exit(_main(sys.argv[1:]))
"""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a warning possible in step FIRST_WARNING."""
    monkeypatch.setattr(data_waits, "WARM_UP_STEPS", 2)
    monkeypatch.setattr(data_waits, "BLOCK_STEPS", 2)
    monkeypatch.setattr(data_waits, "BLOCKS", 3)
    # A busy machine adds to pauses and waits, which are short here.
    monkeypatch.setattr(data_waits, "LONGEST_PAUSE", 1000.0)
    monkeypatch.setattr(data_waits, "SMALLEST_SECONDS", 0.05)


def slow_storage(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Makes every reader wait some seconds for each micro-batch."""
    rows = TokenShards.rows

    def slowed(shards: TokenShards, ids: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        return rows(shards, ids)

    monkeypatch.setattr(TokenShards, "rows", slowed)


@pytest.mark.parametrize(
    ("workers", "seconds", "said"),
    [
        (0, 0.05, "with data.workers=0 rank 0 reads between its steps"),
        # Long enough for a busy machine, because the worker reads while a step computes.
        (1, 0.25, "of their reading time for the storage of "),
    ],
)
def test_slow_reading_is_reported_once(
    workers: int, seconds: float, said: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SLOW_STORAGE.replace("SECONDS", str(seconds)))
    values = make_config(
        allocation={"source": "rule", "rule": "dense"},
        training={"steps": STEPS},
        checkpoint={"every": 0},
        data={"workers": workers},
    )
    run = Path(values["run"]["dir"])
    (alone,) = ended(start(write(values, tmp_path), [str(script)], tasks=1))
    assert alone.code == 0, alone
    rows = read_metrics(run / "metrics.jsonl")
    assert sum(row["data_seconds"] for row in rows) > 0.1 * sum(row["step_seconds"] for row in rows)
    (incident,) = incidents.read(run)
    text = incident["text"]
    assert (incident["kind"], incident["step"]) == ("slow_data", FIRST_WARNING)
    assert text.startswith("training waits for data in ")
    assert said in text
    assert alone.out.count(text) == 1


def test_it_is_repeated_seldom(
    soon: None, make_config: MakeConfig, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_waits, "REPEAT_STEPS", 5)
    slow_storage(monkeypatch, 0.05)
    values = make_config(training={"steps": 15}, checkpoint={"every": 0})
    train(values)
    found = incidents.read(Path(values["run"]["dir"]))
    # Blocks end at even steps.
    assert [(each["kind"], each["step"]) for each in found] == [
        ("slow_data", FIRST_WARNING),
        ("slow_data", FIRST_WARNING + 6),
    ]


def test_fast_reading_is_not_reported(soon: None, make_config: MakeConfig, train: Any) -> None:
    values = make_config(training={"steps": STEPS})
    train(values)
    assert not incidents.read(Path(values["run"]["dir"]))


def test_steps_after_a_pause_do_not_count(
    soon: None, make_config: MakeConfig, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_waits, "LONGEST_PAUSE", 0.0)
    slow_storage(monkeypatch, 0.05)
    values = make_config(training={"steps": STEPS})
    train(values)
    assert not incidents.read(Path(values["run"]["dir"]))


def blocks_of(waits: list[float]) -> list[Waits]:
    """Blocks of steps that take a second each.

    waits: seconds in which each step waits for data.
    """
    found = []
    for first in range(0, len(waits), BLOCK_STEPS):
        waited = sum(waits[first : first + BLOCK_STEPS])
        found.append(Waits(BLOCK_STEPS, BLOCK_STEPS, waited, waited))
    return found


@pytest.mark.parametrize(
    ("waits", "bound"),
    [
        ([0.2] * 40, False),  # too few steps
        ([0.05] * 50, False),
        ([0.2] * 50, True),
        ([0.0] * 29 + [1.0] * 10 + [0.0] * 11, False),  # one long fault of the storage
        ([0.9, 0.0, 0.0, 0.0, 0.0] * 10, True),  # five workers that deliver together
    ],
)
def test_what_bounds_a_run(waits: list[float], bound: bool) -> None:
    assert bound_by_data(blocks_of(waits)) == bound


def test_noise_does_not_count() -> None:
    """A tenth of a step is nothing where a step takes 10 ms."""
    assert not bound_by_data([Waits(10, 0.1, 0.05, 0.05)] * 5)


def test_causes_that_lie_elsewhere(small_data: Path) -> None:
    stream = BatchStream(small_data, seed=0, global_batch=4, micro_batch=2, workers=4)
    others = Waits(50, 50.0, 20.0, 1.0, ReadCost(1 << 20, 1.0, 0.5))
    assert cause(others, stream).startswith("rank 0 had its own after 0.02 s, so other ranks")
    idle = Waits(50, 50.0, 20.0, 20.0, ReadCost(1 << 20, 10.0, 5.0))
    assert "read in only 5% of their time" in cause(idle, stream)
    computing = Waits(50, 50.0, 20.0, 20.0, ReadCost(100 << 20, 200.0, 180.0))
    assert "(data.workers=4, 2 MiB/s) compute in 90% of their" in cause(computing, stream)
    waiting = Waits(50, 50.0, 20.0, 20.0, ReadCost(100 << 20, 200.0, 20.0))
    assert f"wait in 90% of their reading time for the storage of {small_data} or" in cause(
        waiting, stream
    )
