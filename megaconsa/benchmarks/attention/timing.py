"""Checking and timing attention: everybody against the truth in fp64, then everybody in turns on the same tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megaconsa.benchmarks.attention.cases import Inputs
from megaconsa.benchmarks.attention.contestants import Contestant, Run
from megaconsa.benchmarks.attention.truth import Results, truth

BOUNDS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
"""Largest error that a contestant may have."""

ROUNDS, FEWEST_ROUNDS = 30, 3
SECONDS = 0.5
"""Time that a contestant gets in a case: slow ones take part in fewer rounds, spread over all of them."""

FLUSHED_BYTES = 256 * 2**20
"""More than any GPU's L2 cache, so that a pass finds in it nothing of the pass before."""

Notify = Callable[[str], None]
"""Called with what has just been done."""


@dataclass(frozen=True)
class Verdict:
    """How a contestant did on a problem: errors by result, or the reason why there are none."""

    contestant: Contestant
    errors: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    broken: bool = False
    """It took the problem and then failed, other than for lack of memory."""
    run: Run | None = None
    """What was checked, ready to be timed."""

    def wrong(self, bound: float) -> bool:
        # Written so that NaN is wrong.
        return self.broken or not all(error <= bound for error in self.errors.values())


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every round."""

    launches: int
    forward: list[float]
    backward: list[float]


def check(inputs: Inputs, contestants: list[Contestant], notify: Notify) -> list[Verdict]:
    """Runs each contestant that serves the case once, and compares output and gradients with the truth.

    The error of a result is ||x - truth|| / (||truth|| + 0.1 ||gradient of the output||); that of dz counts gates inside (0, 1).
    """
    expected = truth(inputs)
    verdicts = []
    for contestant in contestants:
        if contestant.serves(inputs.case):
            verdicts.append(_verdict(contestant, inputs, expected))
            notify(contestant.name)
    return verdicts


def _verdict(contestant: Contestant, inputs: Inputs, expected: Results) -> Verdict:
    reason = contestant.refusal(inputs)
    if reason is not None:
        return Verdict(contestant, reason=reason)
    try:
        run = contestant.prepare(inputs)
        outputs = run.forward()
        results = run.collect(tuple(x.detach() for x in outputs), run.backward(outputs))
        return Verdict(contestant, errors=errors(results, expected, inputs), run=run)
    except torch.OutOfMemoryError:
        return Verdict(contestant, reason="out of memory")
    except ModuleNotFoundError as error:
        return Verdict(contestant, reason=f"{error.name} is not installed", broken=contestant.ours)
    except (
        Exception
    ) as error:  # whatever another library raises is its own; of ours the command makes a failure
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Verdict(contestant, reason=lines[0][:200], broken=True)


def errors(results: Results, expected: Results, inputs: Inputs) -> dict[str, float]:
    """By name of the result; a gate at exactly 0 or 1 has the derivative 0 of its clamp, whatever the truth says."""
    upstream = 0.1 * inputs.gradient.double().norm()

    def error(name: str) -> float:
        result, right = results[name].double(), expected[name]
        if name == "dz":
            assert inputs.gate is not None
            inside = (inputs.gate > 0) & (inputs.gate < 1)
            result, right = result[inside], right[inside]
        return float((result - right).norm() / (right.norm() + upstream))

    return {name: error(name) for name in expected}


def time_in_turns(runs: dict[str, Run], device: torch.device, notify: Notify) -> dict[str, Timing]:
    """Times forward and backward of every run, by name, in rounds of one each, so that all share the drift of clocks and heat."""
    stopwatch = _GpuStopwatch(device) if device.type == "cuda" else _CpuStopwatch()
    timings = {name: Timing(run.launches, [], []) for name, run in runs.items()}
    stride = {}
    for name, run in runs.items():
        stopwatch.measure(run)  # warm-up
        stopwatch.settle()
        seconds = sum(stopwatch.measure(run)()) / 1e3
        rounds = min(max(int(SECONDS / max(seconds, 1e-6)), FEWEST_ROUNDS), ROUNDS)
        stride[name] = ROUNDS // rounds
    for index in range(ROUNDS):
        stopwatch.settle()
        measured = {
            name: stopwatch.measure(run) for name, run in runs.items() if index % stride[name] == 0
        }
        for name, read in measured.items():
            forward, backward = read()
            timings[name].forward.append(forward)
            timings[name].backward.append(backward)
        notify(f"round {index + 1} of {ROUNDS}")
    return timings


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """The 25th, 50th and 75th percentile."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


class _GpuStopwatch:
    """CUDA events around each pass, on a GPU that is kept busy so that no launch is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def settle(self) -> None:
        """Waits for the GPU, then gives it a few milliseconds of work that the launches of a round run ahead of."""
        torch.cuda.synchronize(self.device)
        for _ in range(16):
            self.cache.zero_()

    def measure(self, run: Run) -> Callable[[], tuple[float, float]]:
        """Queues one forward and one backward pass; the function returned waits for them and gives their milliseconds."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        self.cache.zero_()
        events[0].record()
        outputs = run.forward()
        events[1].record()
        self.cache.zero_()
        events[2].record()
        run.backward(outputs)
        events[3].record()

        def read() -> tuple[float, float]:
            events[3].synchronize()
            return events[0].elapsed_time(events[1]), events[2].elapsed_time(events[3])

        return read


class _CpuStopwatch:
    def settle(self) -> None:
        """Nothing runs on its own here."""

    def measure(self, run: Run) -> Callable[[], tuple[float, float]]:
        start = time.perf_counter()
        outputs = run.forward()
        middle = time.perf_counter()
        run.backward(outputs)
        end = time.perf_counter()
        return lambda: (1e3 * (middle - start), 1e3 * (end - middle))
