"""Learning rate as a function of the step alone, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from megaconsa.config import TrainingSection


def learning_rate(step: int, training: TrainingSection) -> float:
    """Rate of an optimizer step (from 0): linear warm-up, then cosine to the end, or constant with a linear decay at the end."""
    peak, floor = training.learning_rate, training.min_learning_rate
    if step < training.warmup_steps:
        return peak * (step + 1) / training.warmup_steps
    if training.schedule == "cosine":
        span = max(1, training.steps - training.warmup_steps)
        return (
            floor
            + (peak - floor) * (1 + math.cos(math.pi * (step - training.warmup_steps) / span)) / 2
        )
    remaining = training.steps - step
    return floor + (peak - floor) * min(1.0, remaining / training.decay_steps)
