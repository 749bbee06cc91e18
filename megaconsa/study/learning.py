"""What a learning run tells about itself: its cost, its way to the target, its evidence."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megaconsa import run_folder
from megaconsa.reporting.metrics import Row, last, read_metrics, series

FIRST_STEPS = 10
"""Steps that are left out of timings: kernels compile, files are opened."""
NEAR = 0.01
"""Distance of the expected sparsity from the target at which it counts as reached."""


@dataclass(frozen=True)
class LearningFigures:
    """Of one run. None is what its metrics do not hold."""

    cost: float | None
    """Median seconds of a step over those of a dense run."""
    steps_to_target: int | None
    """First step from which on the expected sparsity is within NEAR of the final target; None if it
    is not at the end."""
    split_agreement: float | None
    separated_share: float | None
    scores: list[list[float]] | None
    """(layers, units), by which the table was cut."""


def read_learning(run: Path, dense: Path | None, target: float) -> LearningFigures:
    """Reads a learning run's metrics and gates.

    dense: a dense run on the same GPU, to compare durations with. target: the sparsity it was to
    reach.
    """
    rows = read_metrics(run / run_folder.METRICS)
    own_seconds = step_seconds(rows)
    dense_seconds = None
    if dense is not None and (dense / run_folder.METRICS).is_file():
        dense_seconds = step_seconds(read_metrics(dense / run_folder.METRICS))
    cost = None
    if own_seconds is not None and dense_seconds is not None:
        cost = own_seconds / dense_seconds
    gates = json.loads((run / run_folder.GATES).read_text())
    return LearningFigures(
        cost,
        steps_to_target(rows, target),
        last(rows, "split_agreement"),
        last(rows, "separated_share"),
        gates.get("scores"),
    )


def step_seconds(rows: Sequence[Row]) -> float | None:
    """Median duration of a step after the first FIRST_STEPS; None for a run that is not longer."""
    _, seconds = series(rows[FIRST_STEPS:], "step_seconds")
    return statistics.median(seconds.tolist()) if len(seconds) else None


def steps_to_target(rows: Sequence[Row], target: float) -> int | None:
    """The first step from which on the expected sparsity stays near the target; None where it is
    not at the end."""
    steps, expected = series(rows, "expected_sparsity")
    reached = None
    for step, value in zip(steps.tolist(), expected.tolist(), strict=True):
        if abs(value - target) > NEAR:
            reached = None
        elif reached is None:
            reached = int(step)
    return reached


def best_units(scores: Sequence[Sequence[float]], count: int) -> set[int]:
    """Flat indices of the units with the largest scores; ties keep the lower index."""
    flat = [score if math.isfinite(score) else -math.inf for row in scores for score in row]
    order = sorted(range(len(flat)), key=lambda unit: -flat[unit])
    return set(order[:count])
