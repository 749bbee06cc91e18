"""Times a rank's own forward and backward passes.

The duration of a whole step does not show which rank is slow, because all ranks wait for the
slowest one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

Pause = Callable[[], AbstractContextManager[None]]
"""Makes a context whose time does not count as this rank's own work."""


class ComputeClock:
    """Wraps the passes of a DeepSpeed pipeline engine.

    Excludes time spent waiting for other data ranks and stages. Includes waits within a tensor
    group. On a GPU it records two events per pass, and never waits for them.
    """

    def __init__(self, engine: Any, device: torch.device) -> None:
        from deepspeed.runtime.pipe import schedule

        self._cuda = device.type == "cuda"
        self._passes: list[tuple[Any, Any]] = []
        self._pauses: list[tuple[Any, Any]] = []
        self._spare: list[Any] = []
        self._in_pass = False
        passes = (schedule.ForwardPass, schedule.BackwardPass)
        engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {
            kind: self._timed(engine._INSTRUCTION_MAP[kind]) for kind in passes
        }

    def reset(self) -> None:
        """Forgets all passes so far."""
        if self._cuda:
            self._spare += [mark for marks in self._passes + self._pauses for mark in marks]
        self._passes.clear()
        self._pauses.clear()

    def seconds(self) -> float:
        """Seconds of all passes since `reset`, without the pauses in them.

        On a GPU they must have finished, as they have once the gradient norm was read.
        """
        return self._sum(self._passes) - self._sum(self._pauses)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this context does not count as this rank's own."""
        if not self._in_pass:
            yield
            return
        begin = self._mark()
        yield
        self._pauses.append((begin, self._mark()))

    def _sum(self, marks: list[tuple[Any, Any]]) -> float:
        if self._cuda:
            return sum(begin.elapsed_time(end) for begin, end in marks) / 1000
        return float(sum(end - begin for begin, end in marks))

    def _timed(self, instruction: Callable[..., None]) -> Callable[..., None]:
        def run(engine: Any, *arguments: Any, **named: Any) -> None:
            begin = self._mark()
            self._in_pass = True
            instruction(engine, *arguments, **named)
            self._in_pass = False
            self._passes.append((begin, self._mark()))

        return run

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event
