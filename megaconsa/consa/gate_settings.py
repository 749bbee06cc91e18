"""Settings of the gates, and what a run must offer for them.

They need no torch, so that a configuration is checked quickly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megaconsa.consa import hard_concrete
from megaconsa.consa.constraint import Constraint
from megaconsa.errors import InputError

CLOSING_SHARE = 0.25
"""Last part of a run, in which units are decided."""
DECAY_SHARE = 0.2
"""Last part of the run, over which the gates' learning rate falls to 0.

The decay lets the noise of the samples settle on the target.
"""

ControllerName = Literal["evidence", "paper"]


@dataclass(frozen=True)
class GateSettings:
    """Settings of the gates and of the run that they learn in."""

    constraint: Constraint
    window: int
    controller: ControllerName = "evidence"
    warmup_steps: int = 100
    learning_rate: float = 0.1
    initial: float = 2.5
    seed: int = 0
    global_batch: int = 1
    steps: int = 1000
    """Optimizer steps of the whole run."""

    def __post_init__(self) -> None:
        if self.controller == "evidence":
            longest = math.floor((1 - CLOSING_SHARE) * self.steps)
            reason = "the last quarter decides on units"
        else:
            longest = self.steps - 1
            reason = "the target would not be reached"
        if self.warmup_steps > longest:
            raise InputError(
                f"gates.warmup_steps={self.warmup_steps} must be at most {longest} "
                f"of training.steps={self.steps}: {reason}"
            )
        if self.controller != "evidence":
            self._check_reach()

    def _check_reach(self) -> None:
        """Raises InputError where log_alpha cannot reach its goal at the learning rate.

        log_alpha starts at `initial`. The goal is where P(z > 0) = 1 - sparsity.
        """
        sparsity = self.constraint.sparsity
        if sparsity in (0, 1):
            return  # the goal is infinite
        # probability_nonzero, solved for log_alpha.
        goal = math.log((1 - sparsity) / sparsity) + hard_concrete.BETA * math.log(
            -hard_concrete.GAMMA / hard_concrete.ZETA
        )
        # Adam moves log_alpha by at most its learning rate in each step.
        # The rate falls to 0 over the last part of the run, so that part counts half.
        needed = abs(self.initial - goal) / self.learning_rate
        if needed > (1 - DECAY_SHARE / 2) * self.steps:
            raise InputError(
                f"gates.learning_rate={self.learning_rate:g} cannot bring the gates "
                f"from gates.initial={self.initial:g} to allocation.sparsity={sparsity:g} "
                f"in training.steps={self.steps}: it takes {needed:.0f} steps; raise either"
            )

    def target(self, step: int) -> float:
        """Target sparsity of an optimizer step (from 0). It rises linearly over warmup_steps."""
        sparsity = self.constraint.sparsity
        if self.warmup_steps == 0:
            return sparsity
        return sparsity * min(1.0, (step + 1) / self.warmup_steps)
