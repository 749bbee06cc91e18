"""Measures the loss on held-out data.

While learning, it uses the allocation table that the gates would give now.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

from megaconsa.data.stream import Batch
from megaconsa.training.batches import carries, labelled_tokens
from megaconsa.training.trainer import Callback, Order, Row, Trainer


class Validation(Callback):
    order = Order.MEASURE

    def __init__(self, batches: list[Batch], count: int, every: int) -> None:
        """Evaluates every `every` steps and after the last step. 0 evaluates only after the last.

        batches: this data rank's held-out micro-batches, always the same. Empty on ranks that are
            not in the first pipeline stage.
        count: the number of these micro-batches, on every rank.
        """
        self.batches = batches
        self.count = count
        self.every = every

    def on_step(self, trainer: Trainer, row: Row) -> None:
        due = self.every and trainer.progress.step % self.every == 0
        if due or trainer.progress.step == trainer.training.steps:
            loss = self.evaluate(trainer)
            row["validation_loss"] = loss if math.isfinite(loss) else None

    def evaluate(self, trainer: Trainer) -> float:
        """Returns the mean loss in nats per labelled token of the held-out sequences."""
        labelled = labelled_tokens(self.batches, trainer.mesh)
        with trainer.gates.binarized() if trainer.gates else nullcontext():
            micro_batches = carries(self.batches, labelled, trainer.mesh)
            return trainer.engine.evaluate(micro_batches, self.count)
