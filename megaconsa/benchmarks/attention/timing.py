"""Checks contestants against the truth in fp64, then times them in turns on the same tensors."""

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
"""Largest error that a contestant may have, by dtype."""

ROUNDS = 30
FEWEST_ROUNDS = 3
"""Rounds that even the slowest contestant takes part in."""
SECONDS = 0.5
"""Time that a contestant gets in a case. Slow ones take part in fewer, evenly spread rounds."""

FLUSHED_BYTES = 256 * 2**20
"""More than any GPU's L2 cache, so that a pass finds nothing cached by the pass before."""

Notify = Callable[[str], None]
"""Called with a description of what has just been done."""


@dataclass(frozen=True)
class Verdict:
    """How a contestant did on a problem: its errors, or the reason why there are none."""

    contestant: Contestant
    errors: dict[str, float] = field(default_factory=dict)
    """Errors by result."""
    reason: str | None = None
    """Why there are no errors."""
    broken: bool = False
    """It accepted the problem and then failed, and not for lack of memory."""
    run: Run | None = None
    """What was checked, ready to be timed."""

    def wrong(self, bound: float) -> bool:
        """Whether it failed, or has an error above `bound`."""
        # Written so that NaN counts as wrong.
        return self.broken or not all(error <= bound for error in self.errors.values())


@dataclass(frozen=True)
class Timing:
    """The times of one contestant, in milliseconds per round."""

    launches: int
    """Calls of the attention function that make up one pass."""
    forward: list[float]
    backward: list[float]


def check(inputs: Inputs, contestants: list[Contestant], notify: Notify) -> list[Verdict]:
    """Runs each contestant that serves the case once and compares its results with the truth.

    notify: called with the name of each contestant after its check.

    Returns a verdict for each of them. `errors` defines the error of a result.
    """
    expected = truth(inputs)
    verdicts = []
    for contestant in contestants:
        if contestant.serves(inputs.case):
            verdicts.append(_verdict(contestant, inputs, expected))
            notify(contestant.name)
    return verdicts


def _verdict(contestant: Contestant, inputs: Inputs, expected: Results) -> Verdict:
    """Runs one contestant and compares its output and gradients with the truth."""
    reason = contestant.refusal(inputs)
    if reason is not None:
        return Verdict(contestant, reason=reason)
    try:
        run = contestant.prepare(inputs)
        outputs = run.forward()
        detached = tuple(x.detach() for x in outputs)
        results = run.collect(detached, run.backward(outputs))
        return Verdict(contestant, errors=errors(results, expected, inputs), run=run)
    except torch.OutOfMemoryError:
        return Verdict(contestant, reason="out of memory")
    except ModuleNotFoundError as error:
        return Verdict(contestant, reason=f"{error.name} is not installed", broken=contestant.ours)
    except Exception as error:
        # Other libraries may raise anything. A failure of our own backend fails the command later.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Verdict(contestant, reason=lines[0][:200], broken=True)


def errors(results: Results, expected: Results, inputs: Inputs) -> dict[str, float]:
    """Returns the errors by name of the result.

    The error of a result is ||x - truth|| / (||truth|| + 0.1 ||gradient of the output||). The error
    of dz includes only gates inside (0, 1). A gate at exactly 0 or 1 has the derivative 0 of its
    clamp, whatever the truth is.
    """
    upstream = 0.1 * inputs.gradient.double().norm()

    def error(name: str) -> float:
        result = results[name].double()
        right = expected[name]
        if name == "dz":
            assert inputs.gate is not None
            inside = (inputs.gate > 0) & (inputs.gate < 1)
            result = result[inside]
            right = right[inside]
        return float((result - right).norm() / (right.norm() + upstream))

    return {name: error(name) for name in expected}


def time_in_turns(runs: dict[str, Run], device: torch.device, notify: Notify) -> dict[str, Timing]:
    """Times forward and backward of every run, by name.

    Each round times every run once, so that drifting clocks and heat affect all of them alike.
    """
    stopwatch = _GpuStopwatch(device) if device.type == "cuda" else _CpuStopwatch()
    timings = {name: Timing(run.launches, [], []) for name, run in runs.items()}
    stride = {}
    for name, run in runs.items():
        stopwatch.measure(run)  # Warm-up.
        stopwatch.settle()
        seconds = sum(stopwatch.measure(run)()) / 1e3
        rounds = min(max(int(SECONDS / max(seconds, 1e-6)), FEWEST_ROUNDS), ROUNDS)
        stride[name] = ROUNDS // rounds
    for index in range(ROUNDS):
        stopwatch.settle()
        measured = {}
        for name, run in runs.items():
            if index % stride[name] == 0:
                measured[name] = stopwatch.measure(run)
        # Read only now, so that the GPU queue stays filled during the round.
        for name, read in measured.items():
            forward, backward = read()
            timings[name].forward.append(forward)
            timings[name].backward.append(backward)
        notify(f"round {index + 1} of {ROUNDS}")
    return timings


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Returns the 25th, 50th and 75th percentile."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


class _GpuStopwatch:
    """Puts CUDA events around each pass. A busy GPU ensures that no launch is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def settle(self) -> None:
        """Waits for the GPU, then queues a few milliseconds of work.

        The launches of a round are issued while that work runs.
        """
        torch.cuda.synchronize(self.device)
        for _ in range(16):
            self.cache.zero_()

    def measure(self, run: Run) -> Callable[[], tuple[float, float]]:
        """Queues one forward and one backward pass.

        Returns a function that waits for both and returns their milliseconds.
        """
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
            forward = events[0].elapsed_time(events[1])
            backward = events[2].elapsed_time(events[3])
            return forward, backward

        return read


class _CpuStopwatch:
    """Reads the wall clock around each pass."""

    def settle(self) -> None:
        """Does nothing: a CPU runs nothing asynchronously."""

    def measure(self, run: Run) -> Callable[[], tuple[float, float]]:
        """Runs one forward and one backward pass. Returns a function that returns their times."""
        start = time.perf_counter()
        outputs = run.forward()
        middle = time.perf_counter()
        run.backward(outputs)
        end = time.perf_counter()
        return lambda: (1e3 * (middle - start), 1e3 * (end - middle))
