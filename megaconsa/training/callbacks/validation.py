"""Measures the loss on held-out data.

While learning, it uses the allocation table that the gates would give now.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

from megaconsa.data.stream import Batch
from megaconsa.training.batches import carries, labelled_tokens
from megaconsa.training.trainer import Callback, Order, Row, Trainer


@dataclass(frozen=True)
class HeldOutSet:
    """Held-out sequences of one source, always the same."""

    batches: list[Batch]
    """This data rank's micro-batches. Empty on ranks that are not in the first pipeline stage."""
    count: int
    """The number of micro-batches, on every rank."""
    share: float = 1.0
    """Its weight in the loss of all sources."""
    name: str | None = None
    """The source in a mixture. None if there is only one."""


class Validation(Callback):
    order = Order.MEASURE

    def __init__(self, sets: list[HeldOutSet], every: int) -> None:
        """Evaluates every `every` steps and after the last step. 0 evaluates only after the last.

        sets: one of each source.
        """
        self.sets = sets
        self.every = every

    def is_due(self, trainer: Trainer) -> bool:
        """Whether it evaluates after this step."""
        step = trainer.progress.step
        return step == trainer.training.steps or bool(self.every and step % self.every == 0)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if not self.is_due(trainer):
            return
        mean = 0.0
        for held_out in self.sets:
            loss = self.evaluate(trainer, held_out)
            mean += held_out.share * loss
            if held_out.name is not None:
                row[f"validation_loss_{held_out.name}"] = loss if math.isfinite(loss) else None
        row["validation_loss"] = mean if math.isfinite(mean) else None

    def evaluate(self, trainer: Trainer, held_out: HeldOutSet) -> float:
        """Returns the mean loss in nats per labelled token of the held-out sequences."""
        labelled = labelled_tokens(held_out.batches, trainer.mesh)
        with trainer.gates.binarized() if trainer.gates else nullcontext():
            micro_batches = carries(held_out.batches, labelled, trainer.mesh)
            return trainer.engine.evaluate(micro_batches, held_out.count)
