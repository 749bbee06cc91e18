"""Measures what watching a run costs, as a share of a step's time.

    python -m megaconsa.benchmarks.watching configs/quickstart.yaml [section.field=value ...]

It trains for 100 steps and times, on this rank, every callback that only watches and the decision
about bad steps. Callbacks for metrics, validation and checkpoints are not timed. The first steps
warm up and are not counted. An example on GPUs:

    torchrun --nproc_per_node 8 -m megaconsa.benchmarks.watching configs/tiny_gpu.yaml \\
        run.dir=/tmp/watched
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaconsa import config as configuration
from megaconsa.config import Config
from megaconsa.console import console, guarded
from megaconsa.parallel.mesh import initialize
from megaconsa.parallel.world import join, leave
from megaconsa.training.callbacks.checkpointing import Checkpointing
from megaconsa.training.callbacks.metrics_file import MetricsFile
from megaconsa.training.callbacks.tensorboard import TensorBoard
from megaconsa.training.callbacks.terminal import Terminal
from megaconsa.training.callbacks.validation import Validation
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer

STEPS = 100
WARM_UP = 20
"""Steps that are trained first and not counted."""
OTHERS = (Checkpointing, MetricsFile, TensorBoard, Terminal, Validation)
"""Callbacks that are not timed: they produce a run's results and report its metrics."""


@dataclass
class Clock:
    """Adds up the seconds spent in the functions that it wraps."""

    on: bool = False
    """Whether time is counted, which is off during the warm-up."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with its time counted under `name`."""

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                if self.on:
                    self.seconds[name] += time.perf_counter() - started

        return timed


def measure(
    config: Config, steps: int = STEPS, warm_up: int = WARM_UP
) -> tuple[dict[str, float], float]:
    """Trains and returns the mean seconds per step.

    Returns the seconds of each watcher by name, and those of a whole step with all callbacks.
    """
    world = join()
    inputs = check_inputs(config, world)
    mesh = initialize(config.parallel, world)
    trainer = build_trainer(inputs, mesh)
    clock = Clock()
    for callback in trainer.callbacks:
        if not isinstance(callback, OTHERS):
            for moment in ("before_data", "before_step", "on_step"):
                timed = clock.around(type(callback).__name__, getattr(callback, moment))
                setattr(callback, moment, timed)
    trainer._check = clock.around("bad steps", trainer._check)  # type: ignore[method-assign]
    for callback in trainer.callbacks:
        callback.on_start(trainer)
    started = 0.0
    for number in range(warm_up + steps):
        if number == warm_up:
            clock.on = True
            started = time.perf_counter()
        for callback in trainer.callbacks:
            callback.before_data(trainer)
        for callback in trainer.callbacks:
            callback.before_step(trainer)
        row = trainer.step()
        for callback in trainer.callbacks:
            callback.on_step(trainer, row)
    whole = time.perf_counter() - started
    trainer.completed = True
    for callback in reversed(trainer.callbacks):
        callback.on_finish(trainer)
    watchers = {name: seconds / steps for name, seconds in clock.seconds.items()}
    return watchers, whole / steps


def main() -> None:
    config = configuration.load(Path(sys.argv[1]), sys.argv[2:])
    watchers, whole = measure(config)
    leave()
    slowest_first = sorted(watchers.items(), key=lambda item: -item[1])
    for name, seconds in slowest_first:
        console.print(f"{name:<16} {seconds * 1e6:9.1f} us  {seconds / whole:7.3%}")
    total = sum(watchers.values())
    console.print(
        f"{'all':<16} {total * 1e6:9.1f} us  {total / whole:7.3%} of {whole * 1e3:.1f} ms a step"
    )


if __name__ == "__main__":
    guarded(main)
