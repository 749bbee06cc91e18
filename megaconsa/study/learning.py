"""Figures of a learning run: its cost, when it reached the target, and its evidence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megaconsa import run_folder
from megaconsa.errors import InputError
from megaconsa.files import parse_json
from megaconsa.reporting.metrics import Row, last, read_metrics, series

FIRST_STEPS = 10
"""First steps that are not timed, because kernels compile and files are opened."""
NEAR = 0.01
"""Distance of the expected sparsity from the target at which it counts as reached."""


@dataclass(frozen=True)
class LearningFigures:
    """Figures of one run. None means that its metrics do not have the figure."""

    cost: float | None
    """Median seconds of a step over those of a dense run."""
    steps_to_target: int | None
    """First step from which the expected sparsity stays within NEAR of the final target.

    None if it is not there at the end.
    """
    split_agreement: float | None
    separated_share: float | None
    scores: list[list[float]] | None
    """Scores by which the table was cut, (layers, units)."""


def read_learning(run: Path, dense: Path | None, target: float) -> LearningFigures:
    """Reads a learning run's metrics and gates.

    dense: a dense run on the same GPU, to compare durations with.
    target: the sparsity that the run should reach.
    """
    rows = read_metrics(run / run_folder.METRICS)
    own_seconds = step_seconds(rows)
    dense_seconds = None
    if dense is not None and (dense / run_folder.METRICS).is_file():
        dense_seconds = step_seconds(read_metrics(dense / run_folder.METRICS))
    cost = None
    if own_seconds is not None and dense_seconds is not None:
        cost = own_seconds / dense_seconds
    path = run / run_folder.GATES
    try:
        gates = parse_json(path.read_text())
        scores = gates.get("scores")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove {run} to learn again") from None
    return LearningFigures(
        cost=cost,
        steps_to_target=steps_to_target(rows, target),
        split_agreement=last(rows, "split_agreement"),
        separated_share=last(rows, "separated_share"),
        scores=scores,
    )


def step_seconds(rows: Sequence[Row]) -> float | None:
    """Returns the median duration of a step after the first FIRST_STEPS.

    Returns None for a run that is not longer.
    """
    _, seconds = series(rows[FIRST_STEPS:], "step_seconds")
    return statistics.median(seconds.tolist()) if len(seconds) else None


def steps_to_target(rows: Sequence[Row], target: float) -> int | None:
    """Returns the first step from which the expected sparsity stays near the target.

    Returns None if it is not near the target at the end.
    """
    steps, expected = series(rows, "expected_sparsity")
    reached = None
    for step, value in zip(steps.tolist(), expected.tolist(), strict=True):
        if abs(value - target) > NEAR:
            reached = None
        elif reached is None:
            reached = int(step)
    return reached


def best_units(scores: Sequence[Sequence[float]], count: int) -> set[int]:
    """Returns the flat indices of the units with the largest scores.

    The lower index wins a tie. A score that is not finite counts as the smallest.
    """
    flat = [score if math.isfinite(score) else -math.inf for row in scores for score in row]
    order = sorted(range(len(flat)), key=lambda unit: -flat[unit])
    return set(order[:count])
