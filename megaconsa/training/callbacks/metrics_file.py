"""metrics.jsonl: one JSON object a step."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from megaconsa.files import replace_bytes
from megaconsa.reporting.metrics import read_lines
from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Trainer

logger = logging.getLogger(__name__)

NAME = "metrics.jsonl"


class MetricsFile(Callback):
    """Rows that cannot be written, on a full disk say, wait in memory for a later step: the training itself does not need them."""

    def __init__(self, run: Path) -> None:
        self.path = run / NAME
        self.waiting = b""
        self.written = 0
        """Bytes of the file that are whole rows."""

    def on_start(self, trainer: Trainer) -> None:
        truncate(self.path, trainer.progress.step)
        self.written = self.path.stat().st_size if self.path.exists() else 0

    def on_step(self, trainer: Trainer, row: Row) -> None:
        failed_before = bool(self.waiting)
        self.waiting += json.dumps(row).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not failed_before:
                logger.error("%s cannot be written: %s; its rows wait in memory", self.path, error.strerror)

    def on_finish(self, trainer: Trainer) -> None:
        if self.waiting:
            try:
                self._write()
            except OSError as error:
                logger.error("the last rows of %s are lost: %s", self.path, error.strerror)

    def _write(self) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.truncate(self.written)  # a row of which only a part found room
            file.write(self.waiting)
            if (size := file.tell()) != self.written + len(self.waiting):
                raise OSError(28, "No space left on device")
        self.written, self.waiting = size, b""


def truncate(path: Path, last_step: int) -> None:
    """Drops rows past `last_step` and lines that are no rows, so that each step stands once."""
    if not path.exists():
        return
    kept = [line + b"\n" for line, row in read_lines(path) if row["step"] <= last_step]
    replace_bytes(path, b"".join(kept))
