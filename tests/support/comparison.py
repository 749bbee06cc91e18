"""Lists how one run differs from another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaconsa import run_folder
from megaconsa.checkpoint import store
from megaconsa.checkpoint.store import Checkpoint
from megaconsa.reporting.metrics import CLOCK, read_metrics

TOLERANCE = 1e-5
"""Largest allowed ||a - b|| / ||b|| of a tensor or of a number in the metrics.

It leaves room for sums in another order, in fp32.
"""
UNKNOWN = -2.0
"""Replaces null. No metric has this value."""
DIFFERENCES = {"penalty", "cut_margin"}
"""Metrics that are differences of nearly equal numbers, whose relative rounding error has no bound.

The numbers that they are computed from are compared instead.
"""


@dataclass(frozen=True)
class Difference:
    size: float
    """||a - b|| / ||b||, or inf where names or shapes differ."""
    place: str

    def __str__(self) -> str:
        return f"{self.size:.1e}  {self.place}"


def checkpoint(run: Path, step: int) -> Checkpoint:
    return store.resolve(run / run_folder.CHECKPOINTS / f"step_{step}")


def tensors(saved: Checkpoint) -> dict[str, Tensor]:
    """Weights, Adam's moments, and the values, multipliers and moments of the gates."""
    gates = {f"gates/{name}": value for name, value in (saved.gates() or {}).items()}
    return dict(saved.weights()) | dict(saved.moments()) | gates


def differences(run: Path, reference: Path, steps: tuple[int, ...]) -> list[Difference]:
    """Lists where a run differs from the reference by more than rounding, worst first.

    Covers all metrics, and the checkpoints of `steps`.
    """
    found = list(
        _of_metrics(read_metrics(run / "metrics.jsonl"), read_metrics(reference / "metrics.jsonl"))
    )
    for step in steps:
        own = checkpoint(run, step)
        theirs = checkpoint(reference, step)
        for name in ("tokens", "sequences", "optimizer_steps"):
            if own.state[name] != theirs.state[name]:
                place = f"step {step} {name}: {own.state[name]}, not {theirs.state[name]}"
                found.append(Difference(math.inf, place))
        if own.allocation != theirs.allocation:
            found.append(Difference(math.inf, f"step {step} allocation.json"))
        found += _of_tensors(tensors(own), tensors(theirs), f"step {step} ")
    return _too_large(found)


def differences_of_tensors(run: Path, reference: Path, step: int) -> list[Difference]:
    """Lists the tensors of a checkpoint that differ by more than rounding, worst first."""
    own = tensors(checkpoint(run, step))
    theirs = tensors(checkpoint(reference, step))
    return _too_large(_of_tensors(own, theirs, f"step {step} "))


def _too_large(found: Iterable[Difference]) -> list[Difference]:
    # Written with "not" so that NaN counts as a difference.
    too_large = [each for each in found if not each.size <= TOLERANCE]
    return sorted(too_large, key=lambda each: -each.size)


def _of_tensors(
    own: dict[str, Tensor], theirs: dict[str, Tensor], prefix: str
) -> Iterator[Difference]:
    if own.keys() != theirs.keys():
        yield Difference(math.inf, f"{prefix}names {sorted(own.keys() ^ theirs.keys())}")
    for name in own.keys() & theirs.keys():
        a = own[name]
        b = theirs[name]
        if a.shape != b.shape:
            yield Difference(
                math.inf, f"{prefix}{name} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
            )
        else:
            yield Difference(relative(a, b), prefix + name)


def _of_metrics(own: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[Difference]:
    if [row["step"] for row in own] != [row["step"] for row in theirs]:
        yield Difference(math.inf, f"{len(own)} rows of metrics, not {len(theirs)}")
    for a, b in zip(own, theirs, strict=False):
        values = dict(_numbers(a))
        for name, value in _numbers(b):
            size = relative(values[name], value) if name in values else math.inf
            yield Difference(size, f"row {b['step']} {name}")


def _numbers(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the numbers and lists of numbers of a row. Nested ones are named by both names."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{name}.")
        elif name not in CLOCK | DIFFERENCES:
            # The figures of the evidence are null at first. They must be null in the other run too.
            known = UNKNOWN if value is None else value
            yield prefix + name, torch.tensor(known, dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, or 0 if both are 0."""
    difference = torch.linalg.vector_norm(a.double() - b.double())
    return float(difference / torch.linalg.vector_norm(b.double())) if difference != 0 else 0.0
