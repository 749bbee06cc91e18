"""How long a rank's own forward and backward passes take. The seconds of a step do not tell it: there all ranks wait for the slowest."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Mark = Callable[[], Any]


class ComputeClock:
    """Put into a DeepSpeed pipeline engine. Waits for other data ranks and stages are left out; those inside of a tensor group are not.

    On a GPU two events a pass are recorded, and nothing is waited for before `seconds` is read.
    """

    def __init__(self, engine: Any, device: torch.device) -> None:
        from deepspeed.runtime.pipe import schedule

        self._cuda = device.type == "cuda"
        self._passes: list[tuple[Any, Any]] = []
        self._spare: list[Any] = []
        passes = (schedule.ForwardPass, schedule.BackwardPass)
        engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {
            kind: self._timed(engine._INSTRUCTION_MAP[kind]) for kind in passes
        }

    def reset(self) -> None:
        """Begins anew."""
        if self._cuda:
            self._spare += [mark for marks in self._passes for mark in marks]
        self._passes.clear()

    def seconds(self) -> float:
        """Of all passes since `reset`. On a GPU they must be over."""
        if self._cuda:
            return sum(begin.elapsed_time(end) for begin, end in self._passes) / 1000
        return float(sum(end - begin for begin, end in self._passes))

    def _timed(self, instruction: Callable[..., None]) -> Callable[..., None]:
        def run(engine: Any, *arguments: Any, **named: Any) -> None:
            begin = self._mark()
            instruction(engine, *arguments, **named)
            self._passes.append((begin, self._mark()))

        return run

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event
