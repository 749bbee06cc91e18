"""The base class of callbacks, with the moments at which the trainer calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaconsa.training.trainer import Trainer

Row = dict[str, Any]
"""One line of metrics.jsonl."""


class Callback:
    def on_start(self, trainer: Trainer) -> None:
        """Called before the first step, on every rank."""

    def before_step(self, trainer: Trainer) -> None:
        """Called before each step, on every rank."""

    def on_step(self, trainer: Trainer, row: Row) -> None:
        """Called after each step, on every rank.

        row: the step's metrics, including those that earlier callbacks added.
        """

    def on_finish(self, trainer: Trainer) -> None:
        """Called after the last step, and after an error.

        After an error the trainer is not `completed`.
        """
