"""The parts of a training step, by the names under which a profiler shows them."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

Wrap = Callable[[Callable[..., Any], str], Callable[..., Any]]
"""Takes a function and the name of its part. Returns a function that does the same."""


class Part(StrEnum):
    STEP = "step"
    """The whole step."""
    FORWARD = "forward pass"
    """One micro-batch through this rank's layers. The layers' parts lie inside it."""
    BACKWARD = "backward pass"
    DATA = "data"
    """Reading batches, and copying a micro-batch to the device."""
    GATES = "gates"
    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "MLP"
    BLOCK = "block"
    """What a block does outside its attention and MLP."""
    FINAL_NORM = "final norm"
    HEAD = "head and loss"
    REDUCTION = "gradient reduction"
    """The reduction over data ranks at the end of a step, and of tied weights."""
    TRANSFER = "pipeline transfer"
    OPTIMIZER = "optimizer"
    """Gradient norm, clipping, the check of the step, and AdamW."""
    OTHER = "other"
    """Outside all parts above."""


ENCLOSING = (Part.STEP, Part.FORWARD, Part.BACKWARD)
"""Parts that only hold other parts together."""
LAYERS = (
    Part.EMBEDDING,
    Part.ATTENTION,
    Part.MLP,
    Part.BLOCK,
    Part.FINAL_NORM,
    Part.HEAD,
)
"""Parts that have a forward and a backward pass."""
