"""The recording of some steps of a trainer as a trace, with its parts as named ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function, schedule

from megaconsa.benchmarks.profile.names import range_name
from megaconsa.parallel.deepspeed.step_parts import wrap_parts
from megaconsa.parallel.step_parts import Part
from megaconsa.training.trainer import Trainer


def record(trainer: Trainer, steps: int, path: Path) -> None:
    """Trains `steps` + 2 steps and writes the trace of the last ones to path.

    The first step warms the profiler up. Call it once, because it also names the parts of a step.
    """
    _name_parts(trainer)
    activities = [ProfilerActivity.CPU]
    if trainer.mesh.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    # AdamW of a step runs while the host begins the next one. The step before the first one of the
    # tables is therefore recorded too, but outside the range that marks a step.
    step = _named(trainer.step, Part.STEP)
    with profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=1, active=1 + steps, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        for work in (trainer.step, trainer.step, *[step] * steps):
            work()
            profiler.step()


def _name_parts(trainer: Trainer) -> None:
    """Makes the profiler show the parts of a step as ranges."""
    wrap_parts(trainer.engine.engine, _named)
    trainer.steps = _named_items(trainer.steps, Part.DATA)
    gates = trainer.gates
    if gates is not None:
        gates.sample = _named(gates.sample, Part.GATES)  # type: ignore[method-assign]
        gates.gradient = _named(gates.gradient, Part.GATES)  # type: ignore[method-assign]
        gates.update = _named(gates.update, Part.GATES)  # type: ignore[method-assign]


def _named(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        with record_function(range_name(part)):
            return function(*arguments, **named)

    return run


def _named_items(items: Iterator[Any], part: str) -> Iterator[Any]:
    following = _named(lambda: next(items), part)
    while True:
        try:
            item = following()
        except StopIteration:
            return
        yield item
