"""What a training step tells the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Why a step was not applied."""

    reason: str
    """Completes the sentence "step 7 was not applied: ..."."""
    is_spike: bool = False
    """Every number is finite, but one is far above those of earlier steps."""


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Loss of the global batch, in nats per labelled token."""
    grad_norm: float
    """Global gradient norm, before clipping."""
    fault: Fault | None
    """None if the step was applied."""


NOT_FINITE = Fault("its gradient is not finite")

Check = Callable[[float, float], Fault | None]
"""Takes a step's loss and gradient norm, returns why the step must not be applied."""


def apply_always(loss: float, grad_norm: float) -> Fault | None:
    """A check that finds no fault."""
    return None
