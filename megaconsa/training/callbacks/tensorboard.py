"""Logs to TensorBoard: every number of a step's row as a scalar, and the gates as a picture."""

from __future__ import annotations

import logging
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megaconsa.training.trainer import Callback, Order, Row, Trainer

logger = logging.getLogger(__name__)

PICTURE_EVERY = 50
"""Steps between two pictures of the gates."""


class TensorBoard(Callback):
    order = Order.REPORT
    main_rank_only = True

    def __init__(self, run: Path) -> None:
        self.folder = run / "tensorboard"
        self.writer: SummaryWriter | None = None

    def on_start(self, trainer: Trainer) -> None:
        # purge_step hides what an interrupted run wrote after the checkpoint that it resumes from.
        try:
            self.writer = SummaryWriter(str(self.folder), purge_step=trainer.progress.step + 1)
        except OSError as error:
            logger.error(
                "TensorBoard cannot write to %s: %s; training continues without it",
                self.folder,
                error.strerror,
            )

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if self.writer is None:
            return
        try:
            self._write(self.writer, trainer, row)
        except OSError as error:  # The writer's thread met it some steps ago.
            logger.error(
                "TensorBoard's events cannot be written: %s; there are none from here on",
                error.strerror,
            )
            self.writer = None

    def _write(self, writer: SummaryWriter, trainer: Trainer, row: Row) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(name, value, row["step"])
        if trainer.gates and row["step"] % PICTURE_EVERY == 0:
            table = trainer.gates.gates.open_probability.float().cpu()
            # Layer 0 is at the bottom, as in the report.
            picture = table.flip(0).repeat_interleave(16, 0).repeat_interleave(16, 1)
            writer.add_image("probability_full", picture, row["step"], dataformats="HW")

    def on_finish(self, trainer: Trainer) -> None:
        if self.writer is not None:
            try:
                self.writer.close()
            except OSError as error:
                logger.error("TensorBoard's last events could not be written: %s", error.strerror)
