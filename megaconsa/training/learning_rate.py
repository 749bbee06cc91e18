"""The learning rate, as a function of the step alone. So a resumed run needs no state for it."""

from __future__ import annotations

import math

from megaconsa.config import TrainingSection


def learning_rate(step: int, training: TrainingSection) -> float:
    """The learning rate of an optimizer step.

    Both schedules start with a linear warm-up. `cosine` follows a cosine to the last step. `wsd`
    stays constant and ends with a linear decay.

    step: number of the step, from 0.
    """
    peak = training.learning_rate
    floor = training.min_learning_rate
    if step < training.warmup_steps:
        return peak * (step + 1) / training.warmup_steps
    if training.schedule == "cosine":
        span = max(1, training.steps - training.warmup_steps)
        angle = math.pi * (step - training.warmup_steps) / span
        return floor + (peak - floor) * (1 + math.cos(angle)) / 2
    remaining = training.steps - step
    return floor + (peak - floor) * min(1.0, remaining / training.decay_steps)
