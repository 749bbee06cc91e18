"""Loss on held-out data; while learning, with the table that the gates would give now."""

from __future__ import annotations

import math
from contextlib import nullcontext

from megaconsa.data.stream import Batch
from megaconsa.training.batches import carries, labelled_tokens
from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Trainer


class Validation(Callback):
    def __init__(self, batches: list[Batch], count: int, every: int) -> None:
        """batches: this data rank's `count` held-out micro-batches, always the same; none where the pipeline does not begin."""
        self.batches, self.count, self.every = batches, count, every

    def on_step(self, trainer: Trainer, row: Row) -> None:
        due = self.every and trainer.progress.step % self.every == 0
        if due or trainer.progress.step == trainer.training.steps:
            loss = self.evaluate(trainer)
            row["validation_loss"] = loss if math.isfinite(loss) else None

    def evaluate(self, trainer: Trainer) -> float:
        """Mean loss in nats per labelled token of the held-out sequences."""
        labelled = labelled_tokens(self.batches, trainer.mesh)
        with trainer.gates.binarized() if trainer.gates else nullcontext():
            return trainer.engine.evaluate(
                carries(self.batches, labelled, trainer.mesh), self.count
            )
