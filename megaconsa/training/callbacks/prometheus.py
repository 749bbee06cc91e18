"""Writes metrics.prom: the run's newest numbers in Prometheus' text format.

The textfile collector of Prometheus' node exporter reads the file.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megaconsa import run_folder
from megaconsa.files import replace_text
from megaconsa.training.trainer import Callback, Order, Row, Trainer

logger = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
"""Time between two writes. Prometheus polls every 15 s or less often."""
COUNTERS = ("step", "tokens", "sequences", "skipped")
"""Fields that only grow, except after a rewind."""


class Prometheus(Callback):
    """Exports every number of the row as megaconsa_FIELD{run="..."}.

    It also exports the time of the newest step, so that an alarm can detect a stalled run.
    """

    order = Order.REPORT
    main_rank_only = True

    def __init__(self, run: Path, steps: int) -> None:
        self.path = run / run_folder.PROMETHEUS
        self.steps = steps
        self.labels = f'{{run="{_escaped(str(run))}"}}'
        self.held: dict[str, float] = {}
        """Newest value of each field.

        A field that only some rows have, such as validation_loss, keeps its last value."""
        self.written = -EVERY_SECONDS
        self.failed = False
        # A thread writes the file, because a rename on a shared file system may take long, for
        # example while a checkpoint is being written.
        self.writer = ThreadPoolExecutor(1, "prometheus")
        self.writing: Future[None] | None = None

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.held |= {name: value for name, value in row.items() if isinstance(value, int | float)}
        self.held |= {"steps": self.steps, "last_step_timestamp_seconds": time.time()}
        is_due = time.monotonic() - self.written >= EVERY_SECONDS
        is_writing = self.writing is not None and not self.writing.done()
        if is_due and not is_writing:
            if self.writing is not None:
                self.writing.result()  # Raises errors that the disk did not cause.
            self.written = time.monotonic()
            self.writing = self.writer.submit(self._write, "".join(self._lines()))

    def on_finish(self, trainer: Trainer) -> None:
        self.writer.shutdown()  # Waits for the pending write, whose numbers are older.
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
        lines = []
        for name, value in sorted(self.held.items()):
            kind = "counter" if name in COUNTERS else "gauge"
            lines.append(
                f"# TYPE megaconsa_{name} {kind}\nmegaconsa_{name}{self.labels} {float(value)!r}\n"
            )
        return lines


def _escaped(text: str) -> str:
    """Escapes a label value as the text format requires."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
