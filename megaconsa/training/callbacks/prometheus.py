"""metrics.prom: the newest numbers of the run in Prometheus' text format, for the textfile collector of its node exporter."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megaconsa import run_folder
from megaconsa.files import replace_text
from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Trainer

logger = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
"""Prometheus asks every 15 s or more seldom."""
COUNTERS = ("step", "tokens", "skipped")
"""Fields that only grow, but for a return to a checkpoint."""


class Prometheus(Callback):
    """Every number of the row as megaconsa_FIELD{run="..."}; the time of the newest step too, for an alarm when there is none."""

    def __init__(self, run: Path, steps: int) -> None:
        self.path, self.steps = run / run_folder.PROMETHEUS, steps
        self.labels = f'{{run="{_escaped(str(run))}"}}'
        self.held: dict[str, float] = {}
        """Newest value of each field: one that only some rows have, as validation_loss, stays."""
        self.written = -EVERY_SECONDS
        self.failed = False
        # A shared file system may take its time for a rename, while a checkpoint is being written for instance.
        self.writer = ThreadPoolExecutor(1, "prometheus")
        self.writing: Future[None] | None = None

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.held |= {name: value for name, value in row.items() if isinstance(value, int | float)}
        self.held |= {"steps": self.steps, "last_step_timestamp_seconds": time.time()}
        if time.monotonic() - self.written >= EVERY_SECONDS and (
            self.writing is None or self.writing.done()
        ):
            if self.writing is not None:
                self.writing.result()  # raises what was no fault of the disk
            self.written = time.monotonic()
            self.writing = self.writer.submit(self._write, "".join(self._lines()))

    def on_finish(self, trainer: Trainer) -> None:
        self.writer.shutdown()  # the text that it holds is older
        if self.held:
            self._write("".join(self._lines()))

    def _write(self, text: str) -> None:
        try:
            replace_text(self.path, text)
            self.failed = False
        except OSError as error:
            if not self.failed:
                logger.error("%s cannot be written: %s", self.path, error.strerror)
            self.failed = True

    def _lines(self) -> list[str]:
        return [
            f"# TYPE megaconsa_{name} {'counter' if name in COUNTERS else 'gauge'}\nmegaconsa_{name}{self.labels} {float(value)!r}\n"
            for name, value in sorted(self.held.items())
        ]


def _escaped(text: str) -> str:
    """As the format wants the value of a label."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
