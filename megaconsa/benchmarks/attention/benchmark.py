"""`megaconsa bench-attention` from check to JSON: who is right, who is timed, and what the times mean."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from megaconsa.benchmarks.attention.cases import Case, Shape, all_cases, draw
from megaconsa.benchmarks.attention.contestants import Contestant
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
from megaconsa.model.flops import visible_pairs

BACKWARD_FLOPS = 2.5
"""Of the forward pass: five matrix products instead of two."""

PACKAGES = ("megaconsa", "torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl", "flash-attn")

COMPARED = [
    ("mixed", "triton", "mixed", FLEX_ATTENTION, 0.85),
    ("gated", "triton", "dense", "triton", 1.15),
    ("gated", "triton", "gated", FLASH_ATTENTION_4, None),
    ("gated-half", "triton", "mixed", "triton", 1.05),
    ("mixed", "flash", "mixed", FLASH_ATTENTION_4, 1.03),
]
"""Case and contestant over case and contestant, and the largest quotient of their times that is the project's goal."""


@dataclass(frozen=True)
class Quartiles:
    """Milliseconds, over `rounds` measurements."""

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
    case: str
    contestant: str
    ours: bool
    launches: int
    """Calls of the attention that make up one pass."""
    forward: Quartiles
    backward: Quartiles
    total_ms: float
    """Median forward and median backward."""
    tflops: float
    """TFLOP/s of both passes, by the case's visible pairs."""
    ratio: float | None
    """Total over that of the case's fastest peer; below 1 is faster."""
    errors_small: dict[str, float]
    errors: dict[str, float]
    """At the size that is timed."""

    @property
    def error(self) -> float:
        return max(*self.errors_small.values(), *self.errors.values())


@dataclass(frozen=True)
class Left:
    """A contestant that is not timed in a case."""

    case: str
    contestant: str
    reason: str


@dataclass(frozen=True)
class Ratio:
    name: str
    value: float
    goal: float | None


@dataclass(frozen=True)
class Benchmark:
    shape: Shape
    cases: list[Case]
    rows: list[Row]
    left: list[Left]
    ratios: list[Ratio]

    def to_dict(self, command: str) -> dict[str, Any]:
        """For JSON: figures unrounded, with what is needed to make them again."""
        shape = self.shape
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
            "cases": [
                {**asdict(case), "forward_flops": forward_flops(shape, case)} for case in self.cases
            ],
            "results": [asdict(row) for row in self.rows],
            "not_timed": [asdict(left) for left in self.left],
            "ratios": [asdict(ratio) for ratio in self.ratios],
        }


def select_cases(shape: Shape, names: Sequence[str]) -> list[Case]:
    """The cases of these names in their usual order, all if there are none; InputError for a name that is unknown."""
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
    """Checks everybody on a small problem and shows the errors; then checks and times everybody at `shape`, case by case.

    show: called with the verdicts of every case before a wrong one of our backends ends the benchmark by RunError. Raises
    InputError for an unknown name of a case.
    """
    cases, bound = select_cases(shape, names), BOUNDS[shape.dtype]
    small = shape.small()
    checked: dict[str, list[Verdict]] = {}
    with progress(
        "checking", sum(c.serves(case) for case in cases for c in contestants), "contestants"
    ) as task:
        for case in select_cases(small, names):
            checked[case.name] = check(
                draw(small, case), contestants, _noting(task, f"{case.name}: ")
            )
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
    sound = {
        verdict.contestant.name: verdict for verdict in small if _reason(verdict, bound) is None
    }
    verdicts = check(
        draw(shape, case), [verdict.contestant for verdict in sound.values()], _noting(task)
    )
    _refuse_wrong(case.name, verdicts, bound, shape)
    left = [
        Left(case.name, verdict.contestant.name, reason)
        for verdict in [*small, *verdicts]
        if (reason := _reason(verdict, bound)) is not None
    ]
    ready = {
        v.contestant.name: v for v in verdicts if v.run is not None and _reason(v, bound) is None
    }
    runs = {name: verdict.run for name, verdict in ready.items() if verdict.run is not None}
    timings = time_in_turns(runs, shape.device, _noting(task))
    peers = [_total(timing) for name, timing in timings.items() if not ready[name].contestant.ours]
    flops = (1 + BACKWARD_FLOPS) * forward_flops(shape, case)
    rows = [
        Row(
            case=case.name,
            contestant=name,
            ours=ready[name].contestant.ours,
            launches=timing.launches,
            forward=Quartiles.of(timing.forward),
            backward=Quartiles.of(timing.backward),
            total_ms=_total(timing),
            tflops=flops / _total(timing) / 1e9,
            ratio=_total(timing) / min(peers) if peers else None,
            errors_small=sound[name].errors,
            errors=ready[name].errors,
        )
        for name, timing in timings.items()
    ]
    return rows, left


def forward_flops(shape: Shape, case: Case) -> int:
    """Of the visible pairs alone: Q K^T and P V cost 2 * head_dim each, for every query head of every sequence."""
    return 4 * shape.head_dim * shape.batch * shape.group * case.pairs(visible_pairs, shape.length)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _reason(verdict: Verdict, bound: float) -> str | None:
    """Why the contestant is not timed."""
    if verdict.reason is not None or not verdict.wrong(bound):
        return verdict.reason
    worst = _worst(verdict)
    return f"wrong: {worst} has the error {verdict.errors[worst]:.1e}, more than {bound:g}"


def _refuse_wrong(case: str, verdicts: list[Verdict], bound: float, shape: Shape) -> None:
    for verdict in verdicts:
        if verdict.contestant.ours and verdict.wrong(bound):
            raise RunError(
                f"no speed is reported, because {verdict.contestant.name} fails the case {case} at batch {shape.batch}, "
                f"length {shape.length}, window {shape.window}: {_reason(verdict, bound)}"
            )


def _worst(verdict: Verdict) -> str:
    """The result with the largest error; NaN is larger than any."""
    return max(
        verdict.errors,
        key=lambda name: (verdict.errors[name] != verdict.errors[name], verdict.errors[name]),
    )


def compare(rows: list[Row]) -> list[Ratio]:
    """The quotients of COMPARED whose both sides were timed."""
    totals = {(row.case, row.contestant): row.total_ms for row in rows}
    ratios = []
    for case, name, other_case, other, goal in COMPARED:
        if (case, name) in totals and (other_case, other) in totals:
            quotient = totals[case, name] / totals[other_case, other]
            ratios.append(Ratio(f"{case} {name} / {other_case} {other}", quotient, goal))
    return ratios


def _total(timing: Timing) -> float:
    return quartiles(timing.forward)[1] + quartiles(timing.backward)[1]


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
