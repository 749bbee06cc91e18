"""The moments at which the trainer calls a callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaconsa.training.trainer import Trainer

Row = dict[str, Any]
"""One line of metrics.jsonl."""


class Callback:
    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, on every rank."""

    def before_step(self, trainer: Trainer) -> None:
        """Before each step, on every rank."""

    def on_step(self, trainer: Trainer, row: Row) -> None:
        """After each step, on every rank; `row` is complete as far as the callbacks before this one made it."""

    def on_finish(self, trainer: Trainer) -> None:
        """After the last step, also when an error ends the run: then the trainer is not `completed`."""
