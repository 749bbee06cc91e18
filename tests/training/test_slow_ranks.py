"""The rank that the others wait for is found, and no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa import incidents
from megaconsa.reporting.metrics import read_metrics
from megaconsa.training.callbacks.slow_ranks import slow_ranks
from tests.support.ranks import ended, start, write

SLOW_RANK = """
import sys, time
from megaconsa.parallel.pipeline import BlockLayer
from megaconsa.train import _main
from torch import distributed as dist

forward = BlockLayer.forward
def slow(layer, *arguments):
    if dist.get_rank() == 1:
        time.sleep(0.15)
    return forward(layer, *arguments)
BlockLayer.forward = slow
sys.exit(_main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("seconds", "stage_ranks", "slow"),
    [
        ((1.0,), 1, set()),
        ((1.0, 1.2), 2, set()),
        ((1.0, 2.0), 2, {1}),
        ((1.0, 1.0, 1.4, 1.0, 3.0, 1.0), 6, {2, 4}),
        ((1.0, 1.0, 2.0, 2.0), 2, set()),  # a more expensive stage is not slow
        ((1.0, 1.0, 2.0, 2.8), 2, {3}),
        ((0.001, 0.009), 2, set()),
    ],
)
def test_beside_its_own_stage(seconds: tuple[float, ...], stage_ranks: int, slow: set[int]) -> None:
    assert slow_ranks(seconds, stage_ranks) == slow


def test_a_rank_with_slow_layers(
    make_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The steps of both ranks take equally long, because the ranks wait for each other."""
    script = tmp_path / "script.py"
    script.write_text(SLOW_RANK)
    values = make_config(training={"micro_batch": 1})
    tasks = ended(start(write(values, tmp_path), [str(script)]))
    assert [task.code for task in tasks] == [0, 0], tasks
    row = read_metrics(Path(values["run"]["dir"]) / "metrics.jsonl")[-1]
    # Each step has four layers and two micro-batches. The delay is well above what a busy machine
    # adds to the other rank's work.
    assert row["slowest_rank"] == 1
    assert row["slowest_rank_seconds"] > 8 * 0.15
    assert row["slowest_rank_seconds"] - row["rank_seconds"] == pytest.approx(8 * 0.15, rel=0.5)
    assert row["rank_seconds"] < row["step_seconds"] / 2
    assert row["largest_memory_gib"] >= row["memory_gib"]
    (found,) = incidents.read(Path(values["run"]["dir"]))
    assert (found["kind"], found["rank"], found["step"]) == ("slow_rank", 1, 6)
    assert "rank 1 on " in tasks[0].out
    assert "is slow: its own work took" in tasks[0].out
