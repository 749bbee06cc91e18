"""Shows the progress of the run on the terminal."""

from __future__ import annotations

from contextlib import ExitStack

from megaconsa.console import Task, progress
from megaconsa.training.trainer import Callback, Order, Row, Trainer


class Terminal(Callback):
    order = Order.REPORT
    main_rank_only = True

    def __init__(self, description: str) -> None:
        self.description = description
        self.stack = ExitStack()
        self.task: Task | None = None

    def on_start(self, trainer: Trainer) -> None:
        bar = progress(self.description, trainer.training.steps, "steps")
        self.task = self.stack.enter_context(bar)
        self.task.advance(trainer.progress.step)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        assert self.task is not None
        note = "loss is not finite" if row["loss"] is None else f"loss {row['loss']:.3f}"
        if "expected_sparsity" in row:
            note += f", sparsity {row['expected_sparsity']:.3f} of {row['target_sparsity']:.3f}"
        if row.get("validation_loss") is not None:
            note += f", validation {row['validation_loss']:.3f}"
        note += f", {row['tokens_per_second']:,.0f} tokens/s"
        if row["mfu"] is not None:
            note += f", MFU {row['mfu']:.1%}"
        self.task.advance(1, note)

    def on_finish(self, trainer: Trainer) -> None:
        self.stack.close()
