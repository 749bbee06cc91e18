"""Which steps are not applied: those whose loss or gradient is not finite, and spikes of either if
the configuration says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from megaconsa.config import BadStepsSection
from megaconsa.errors import RunError
from megaconsa.parallel.step_result import Fault

WINDOW = 128
"""Applied steps that a new one is compared with."""
LEAST = 64
"""Number of applied steps before which no step counts as a spike."""
DEVIATION_OF_MAD = 1.4826
"""A normal distribution's standard deviation is this many median absolute deviations."""
SMALLEST_DEVIATION = 0.01
"""Lower bound of the deviation, as a share of the median.

Without it, a small change of a nearly constant loss would be a spike."""


@dataclass
class BadSteps:
    """What a run remembers of its steps.

    Checkpoints hold it, so that a resumed run decides as an uninterrupted one does.
    """

    skipped: int = 0
    """Steps that were not applied, in the whole run."""
    in_row: int = 0
    """Steps in a row up to now that were not applied."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last WINDOW applied steps, oldest first."""
    grad_norms: list[float] = field(default_factory=list)

    def fault(self, section: BadStepsSection, numbers: dict[str, float]) -> Fault | None:
        """Why a step must not be applied, or None.

        numbers: the step's loss, its grad_norm, and whatever else must be finite, by name.

        A spike lies more than `bad_steps.deviations` deviations above the median of the applied
        steps before it. OLMo's trainer skips steps by the same rule on mean and standard deviation.
        We use the median, because one spike would raise the mean and hide the next.
        """
        for name, value in numbers.items():
            if not math.isfinite(value):
                return Fault(f"its {name} is {value}")
        if section.spikes == "keep":
            return None
        for name, before in (("loss", self.losses), ("grad_norm", self.grad_norms)):
            value = numbers[name]
            height = deviations(value, before)
            if height > section.deviations:
                return Fault(
                    f"its {name} of {value:.4g} lies {height:.1f} deviations above "
                    f"{median(before):.4g}",
                    is_spike=True,
                )
        return None

    def applied(self, loss: float, grad_norm: float) -> None:
        self.in_row = 0
        self.losses = [*self.losses, loss][-WINDOW:]
        self.grad_norms = [*self.grad_norms, grad_norm][-WINDOW:]

    def skip(self, section: BadStepsSection, step: int, fault: str) -> None:
        """Counts a step that was not applied. Raises RunError if there are too many in a row."""
        self.skipped += 1
        self.in_row += 1
        if self.in_row == section.limit:
            raise RunError(
                f"{self.in_row} steps in a row, up to step {step}, were not applied "
                f"(bad_steps.limit={section.limit}): of the last one {fault}; lower "
                "training.learning_rate, or continue from an earlier checkpoint"
            )


def deviations(value: float, before: Sequence[float]) -> float:
    """How many robust standard deviations a value lies above the median of those before it.

    Returns 0 if there are too few values before it.
    """
    if len(before) < LEAST:
        return 0.0
    middle = median(before)
    spread = DEVIATION_OF_MAD * median(abs(each - middle) for each in before)
    return (value - middle) / max(spread, SMALLEST_DEVIATION * abs(middle), 1e-30)
