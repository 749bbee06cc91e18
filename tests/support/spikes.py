"""Spikes of the loss, made by a gradient that is a thousand times too large."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from megaconsa.parallel.deepspeed.engine import Engine
from megaconsa.parallel.step_result import StepResult


@contextmanager
def spike_in(call: int) -> Iterator[None]:
    """Multiplies the gradient of one weight by a thousand, in one call of train_step."""
    original = Engine.train_step
    calls = 0

    def poisoned(engine: Engine, *arguments: Any) -> StepResult:
        nonlocal calls
        calls += 1
        if calls != call:
            return original(engine, *arguments)
        hook = next(iter(engine.distributed.parameters.values())).register_hook(
            lambda gradient: gradient * 1000
        )
        try:
            return original(engine, *arguments)
        finally:
            hook.remove()

    with patch.object(Engine, "train_step", poisoned):
        yield
