"""`megaconsa bench-attention` from the check to JSON.

It decides which contestants are right and which are timed, and turns times into figures.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from megaconsa.benchmarks.attention.cases import Case, Shape, all_cases, draw
from megaconsa.benchmarks.attention.contestants import Contestant, Run
from megaconsa.benchmarks.attention.peers import FLASH_ATTENTION_4, FLEX_ATTENTION
from megaconsa.benchmarks.attention.timing import (
    BOUNDS,
    Notify,
    Timing,
    Verdict,
    check,
    quartiles,
    time_in_turns,
)
from megaconsa.console import Task, progress
from megaconsa.errors import InputError, RunError
from megaconsa.model.flops import attention_pairs

BACKWARD_FLOPS = 2.5
"""FLOPs of the backward pass over those of the forward pass: five matrix products over two."""

PACKAGES = ("megaconsa", "torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl", "flash-attn")

COMPARED = [
    ("mixed", "triton", "mixed", FLEX_ATTENTION, 0.85),
    ("gated", "triton", "dense", "triton", 1.15),
    ("gated", "triton", "gated", FLASH_ATTENTION_4, None),
    ("gated-half", "triton", "mixed", "triton", 1.05),
    ("mixed", "flash", "mixed", FLASH_ATTENTION_4, 1.03),
]
"""Pairs of times to compare: case and contestant over case and contestant.

The last entry is the project's goal, the largest quotient that meets it. None: there is no goal.
"""


@dataclass(frozen=True)
class Quartiles:
    """The quartiles of `rounds` measurements, in milliseconds."""

    median: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(samples: list[float]) -> Quartiles:
        low, median, high = quartiles(samples)
        return Quartiles(median, low, high, len(samples))


@dataclass(frozen=True)
class Row:
    """The figures of one contestant in one case."""

    case: str
    contestant: str
    ours: bool
    launches: int
    """Calls of the attention function that make up one pass."""
    forward: Quartiles
    backward: Quartiles
    total_ms: float
    """Median of the forward pass plus median of the backward pass."""
    tflops: float
    """TFLOP/s of both passes together. Only the case's visible pairs count."""
    ratio: float | None
    """Total time over that of the case's fastest peer. Below 1 is faster."""
    errors_small: dict[str, float]
    """Errors by result on the small problem."""
    errors: dict[str, float]
    """Errors by result at the size that is timed."""

    @property
    def error(self) -> float:
        """The largest error of any result at either size."""
        return max(*self.errors_small.values(), *self.errors.values())


@dataclass(frozen=True)
class Left:
    """A contestant that is not timed in a case."""

    case: str
    contestant: str
    reason: str


@dataclass(frozen=True)
class Ratio:
    """A quotient of two times from COMPARED, and its goal."""

    name: str
    value: float
    goal: float | None


@dataclass(frozen=True)
class Benchmark:
    """All results of one `megaconsa bench-attention`."""

    shape: Shape
    cases: list[Case]
    rows: list[Row]
    left: list[Left]
    ratios: list[Ratio]

    def to_dict(self, command: str) -> dict[str, Any]:
        """Returns the content of the JSON file: unrounded figures and what reproduces them."""
        shape = self.shape
        cases = [
            {**asdict(case), "forward_flops": forward_flops(shape, case)} for case in self.cases
        ]
        return {
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device_name(shape.device),
            "versions": _versions(),
            "shape": {
                **asdict(shape),
                "dtype": str(shape.dtype).removeprefix("torch."),
                "device": str(shape.device),
            },
            "bound": BOUNDS[shape.dtype],
            "cases": cases,
            "results": [asdict(row) for row in self.rows],
            "not_timed": [asdict(left) for left in self.left],
            "ratios": [asdict(ratio) for ratio in self.ratios],
        }


def select_cases(shape: Shape, names: Sequence[str]) -> list[Case]:
    """Returns the cases with these names in their usual order, or all cases if there are no names.

    Raises InputError for an unknown name.
    """
    cases = all_cases(shape)
    known = [case.name for case in cases]
    for name in names:
        if name not in known:
            raise InputError(f"--case {name} is unknown; choose one of {', '.join(known)}")
    return [case for case in cases if case.name in names or not names]


def run_benchmark(
    shape: Shape,
    names: Sequence[str],
    contestants: list[Contestant],
    show: Callable[[dict[str, list[Verdict]]], None],
) -> Benchmark:
    """Checks all contestants on a small problem, then checks and times them at `shape`.

    names: cases to run. None given means all.
    show: called with the verdicts on the small problem by case, before any of them ends the run.

    Raises InputError for an unknown case name. Raises RunError if one of our backends is wrong.
    """
    cases = select_cases(shape, names)
    bound = BOUNDS[shape.dtype]
    small = shape.small()
    checked: dict[str, list[Verdict]] = {}
    checks = sum(contestant.serves(case) for case in cases for contestant in contestants)
    with progress("checking", checks, "contestants") as task:
        for case in select_cases(small, names):
            inputs = draw(small, case)
            checked[case.name] = check(inputs, contestants, _noting(task, f"{case.name}: "))
    show(checked)
    for name, verdicts in checked.items():
        _refuse_wrong(name, verdicts, bound, small)
    rows: list[Row] = []
    left: list[Left] = []
    for case in cases:
        with progress(case.name, None, "steps") as task:
            new, out = _time_case(shape, case, checked[case.name], bound, task)
        rows += new
        left += out
    return Benchmark(shape, cases, rows, left, compare(rows))


def _time_case(
    shape: Shape, case: Case, small: list[Verdict], bound: float, task: Task
) -> tuple[list[Row], list[Left]]:
    """Checks and times one case. Returns the rows, and who is not timed.

    small: the verdicts on the small problem.
    """
    sound = {
        verdict.contestant.name: verdict for verdict in small if _reason(verdict, bound) is None
    }
    contestants = [verdict.contestant for verdict in sound.values()]
    verdicts = check(draw(shape, case), contestants, _noting(task))
    _refuse_wrong(case.name, verdicts, bound, shape)
    left: list[Left] = []
    for verdict in [*small, *verdicts]:
        reason = _reason(verdict, bound)
        if reason is not None:
            left.append(Left(case.name, verdict.contestant.name, reason))
    ready: dict[str, Verdict] = {}
    runs: dict[str, Run] = {}
    for verdict in verdicts:
        if verdict.run is not None and _reason(verdict, bound) is None:
            ready[verdict.contestant.name] = verdict
            runs[verdict.contestant.name] = verdict.run
    timings = time_in_turns(runs, shape.device, _noting(task))
    peers = [_total(timing) for name, timing in timings.items() if not ready[name].contestant.ours]
    flops = (1 + BACKWARD_FLOPS) * forward_flops(shape, case)
    rows: list[Row] = []
    for name, timing in timings.items():
        total_ms = _total(timing)
        row = Row(
            case=case.name,
            contestant=name,
            ours=ready[name].contestant.ours,
            launches=timing.launches,
            forward=Quartiles.of(timing.forward),
            backward=Quartiles.of(timing.backward),
            total_ms=total_ms,
            tflops=flops / total_ms / 1e9,
            ratio=total_ms / min(peers) if peers else None,
            errors_small=sound[name].errors,
            errors=ready[name].errors,
        )
        rows.append(row)
    return rows, left


def forward_flops(shape: Shape, case: Case) -> int:
    """Returns the FLOPs of a forward pass, counting only pairs within windows and documents.

    Q K^T and P V cost 2 * head_dim each per pair, for every query head of every sequence.
    """
    lengths = [shape.length] * shape.batch
    if case.packed:
        lengths = [length for documents in shape.document_lengths() for length in documents]
    # `pairs` counts one query head of every KV head.
    return 4 * shape.head_dim * shape.group * case.pairs(attention_pairs, lengths)


def device_name(device: torch.device) -> str:
    """Returns the GPU's name, or the CPU's architecture and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _reason(verdict: Verdict, bound: float) -> str | None:
    """Returns why the contestant is not timed, or None if it is."""
    if verdict.reason is not None or not verdict.wrong(bound):
        return verdict.reason
    worst = _worst(verdict)
    return f"wrong: {worst} has the error {verdict.errors[worst]:.1e}, more than {bound:g}"


def _refuse_wrong(case: str, verdicts: list[Verdict], bound: float, shape: Shape) -> None:
    """Raises RunError if one of our backends is wrong."""
    for verdict in verdicts:
        if verdict.contestant.ours and verdict.wrong(bound):
            raise RunError(
                f"no speed is reported, because {verdict.contestant.name} "
                f"fails the case {case} at batch {shape.batch}, "
                f"length {shape.length}, window {shape.window}: {_reason(verdict, bound)}"
            )


def _worst(verdict: Verdict) -> str:
    """Returns the name of the result with the largest error. NaN is larger than any number."""

    def badness(name: str) -> tuple[bool, float]:
        error = verdict.errors[name]
        return math.isnan(error), error

    return max(verdict.errors, key=badness)


def compare(rows: list[Row]) -> list[Ratio]:
    """Returns the quotients of COMPARED for which both sides were timed."""
    totals = {(row.case, row.contestant): row.total_ms for row in rows}
    ratios = []
    for case, name, other_case, other, goal in COMPARED:
        if (case, name) in totals and (other_case, other) in totals:
            quotient = totals[case, name] / totals[other_case, other]
            ratios.append(Ratio(f"{case} {name} / {other_case} {other}", quotient, goal))
    return ratios


def _total(timing: Timing) -> float:
    """Returns the median of the forward pass plus that of the backward pass, in milliseconds."""
    _, forward, _ = quartiles(timing.forward)
    _, backward, _ = quartiles(timing.backward)
    return forward + backward


def _noting(task: Task, before: str = "") -> Notify:
    return lambda done: task.advance(note=before + done)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    cudnn = torch.backends.cudnn.version()
    versions["cudnn"] = None if cudnn is None else str(cudnn)
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions
