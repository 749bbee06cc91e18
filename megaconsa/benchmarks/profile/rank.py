"""One rank of `megaconsa profile`: trains a few steps and records some of them.

The tool starts it as

    python -m megaconsa.benchmarks.profile.rank CONFIG OUT STEPS [section.field=value ...]

STEPS is how many steps are traced. Each rank writes its trace and its memory snapshot to a folder
beside OUT. The main rank writes OUT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from megaconsa.benchmarks.profile.names import (
    EXTRA_STEPS,
    MEMORY,
    TRACE,
    range_name,
    rank_folder,
)
from megaconsa.benchmarks.short_run_rank import work_as_rank
from megaconsa.console import guarded
from megaconsa.files import replace_text
from megaconsa.parallel.deepspeed.step_parts import wrap_parts
from megaconsa.parallel.step_parts import Part
from megaconsa.training.trainer import Trainer

MEMORY_EVENTS = 200_000
"""Allocations and frees that a snapshot holds at most. The oldest are dropped."""


def main(config_path: Path, out: Path, steps: int, overrides: list[str]) -> None:
    work_as_rank(config_path, out, overrides, partial(_profile, out, steps))


def _profile(out: Path, steps: int, trainer: Trainer) -> None:
    on_gpu = trainer.mesh.device.type == "cuda"
    skipped = trainer.training.steps - steps - EXTRA_STEPS
    rows = [trainer.step() for _ in range(skipped)]
    folder = out.parent / rank_folder(trainer.mesh.world.rank)
    folder.mkdir(parents=True)
    _name_parts(trainer)
    _trace(trainer, steps, folder / TRACE, on_gpu)
    if on_gpu:
        _snapshot(trainer, folder / MEMORY)
    if trainer.mesh.is_main:
        device = torch.cuda.get_device_name(trainer.mesh.device) if on_gpu else "cpu"
        result = {
            "device": device,
            "torch": torch.__version__,
            # The first step compiles kernels.
            "step_ms_without_profiler": 1000
            * median(row["step_seconds"] for row in rows[1:] or rows),
        }
        replace_text(out, json.dumps(result))


def _trace(trainer: Trainer, steps: int, path: Path, on_gpu: bool) -> None:
    activities = [ProfilerActivity.CPU]
    if on_gpu:
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


def _snapshot(trainer: Trainer, path: Path) -> None:
    """Writes the allocations of one step, with the Python stack of each.

    This step is not traced, because recording stacks slows the host down.
    """
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=MEMORY_EVENTS)
    trainer.step()
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)


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


if __name__ == "__main__":
    guarded(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
