"""Which steps are not applied: those whose loss or gradient is not finite and, where the configuration says so, spikes of either."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from megaconsa.config import BadStepsSection
from megaconsa.errors import RunError

WINDOW = 128
"""Applied steps that a new one is compared with."""
LEAST = 64
"""No step is a spike before so many were applied."""
DEVIATION_OF_MAD = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""
SMALLEST_DEVIATION = 0.01
"""As a share of the median: a loss that hardly moves must not make a spike of a small step."""


@dataclass
class BadSteps:
    """What a run knows of its steps so far; a part of its checkpoints, so that a resumed run decides as an uninterrupted one does."""

    skipped: int = 0
    """Steps that were not applied."""
    in_row: int = 0
    """Of these, the last ones."""
    losses: list[float] = field(default_factory=list)
    """Of the last WINDOW applied steps, oldest first."""
    grad_norms: list[float] = field(default_factory=list)

    def fault(self, section: BadStepsSection, numbers: dict[str, float]) -> str | None:
        """Why a step is not to be applied; None where it is. numbers: its loss, grad_norm and what else must be finite, by name.

        A spike lies more than `bad_steps.deviations` above the median of the applied steps before it. OLMo's trainer skips steps by
        the same rule on mean and standard deviation, which one spike raises for the next.
        """
        for name, value in numbers.items():
            if not math.isfinite(value):
                return f"its {name} is {value}"
        if section.spikes != "keep":
            for name, before in (("loss", self.losses), ("grad_norm", self.grad_norms)):
                if (height := deviations(numbers[name], before)) > section.deviations:
                    return f"its {name} of {numbers[name]:.4g} lies {height:.1f} deviations above {median(before):.4g}"
        return None

    def applied(self, loss: float, grad_norm: float) -> None:
        self.in_row = 0
        self.losses = [*self.losses, loss][-WINDOW:]
        self.grad_norms = [*self.grad_norms, grad_norm][-WINDOW:]

    def skip(self, section: BadStepsSection, step: int, fault: str) -> None:
        """Counts a step that was not applied; RunError where there are too many in a row."""
        self.skipped += 1
        self.in_row += 1
        if self.in_row == section.limit:
            raise RunError(
                f"{self.in_row} steps in a row, up to step {step}, were not applied (bad_steps.limit={section.limit}): of the last one "
                f"{fault}; lower training.learning_rate, or go on from an earlier checkpoint"
            )


def deviations(value: float, before: Sequence[float]) -> float:
    """How many robust standard deviations a value lies above the median of those before it; 0 where these are too few to tell."""
    if len(before) < LEAST:
        return 0.0
    middle = median(before)
    spread = DEVIATION_OF_MAD * median(abs(each - middle) for each in before)
    return (value - middle) / max(spread, SMALLEST_DEVIATION * abs(middle), 1e-30)
