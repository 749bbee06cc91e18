"""metrics.jsonl: one JSON object a step."""

from __future__ import annotations

import errno
import json
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from megaconsa import run_folder
from megaconsa.files import replace_bytes
from megaconsa.reporting.metrics import read_lines
from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Trainer

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 0.2
"""Of a step for its row to be written."""
LAST_WAIT_SECONDS = 60.0
"""For the last rows to be written at the end of a run."""


class MetricsFile(Callback):
    """Rows are written in a thread of their own, so that a file system that does not answer holds
    up no step. Rows that cannot be written, on a full disk say, wait in memory for a later step."""

    def __init__(self, run: Path) -> None:
        self.path = run / run_folder.METRICS
        self.waiting: list[bytes] = []
        """Rows that are not in the file yet. Steps append to it, the thread takes from its front."""
        self.written = 0
        """Bytes of the file that are whole rows."""
        self.failing = False
        self.thread = ThreadPoolExecutor(1, "metrics")
        self.writing: Future[None] | None = None

    def on_start(self, trainer: Trainer) -> None:
        truncate(self.path, trainer.progress.step)
        self.written = self.path.stat().st_size if self.path.exists() else 0

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.waiting.append(json.dumps(row).encode() + b"\n")
        if not self._is_writing():
            # A step waits for its own row, so that no checkpoint is older than its metrics, but it
            # does not wait long.
            self._write(PATIENCE_SECONDS)

    def on_finish(self, trainer: Trainer) -> None:
        if self.writing is not None:
            wait([self.writing], LAST_WAIT_SECONDS)
        if self.waiting and not self._is_writing():
            self._write(LAST_WAIT_SECONDS)
        if self.waiting:
            logger.error("the last rows of %s are lost", self.path)
        self.thread.shutdown(wait=False)

    def _is_writing(self) -> bool:
        return self.writing is not None and not self.writing.done()

    def _write(self, seconds: float) -> None:
        """Has the thread write what waits, and gives it so long."""
        self.writing = self.thread.submit(self._append_waiting)
        wait([self.writing], seconds)
        if self.writing.done():
            self.writing.result()  # raises what was no fault of the disk

    def _append_waiting(self) -> None:
        count = len(self.waiting)
        rows = b"".join(self.waiting[:count])
        try:
            self.written = self._append(rows)
        except OSError as error:
            if not self.failing:
                logger.error(
                    "%s cannot be written: %s; its rows wait in memory", self.path, error.strerror
                )
            self.failing = True
            return
        self.failing = False
        del self.waiting[:count]

    def _append(self, rows: bytes) -> int:
        """Returns the size of the file."""
        with self.path.open("ab", buffering=0) as file:
            file.truncate(self.written)  # a row of which only a part found room
            file.write(rows)
            size = file.tell()
        if size != self.written + len(rows):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return size


def truncate(path: Path, last_step: int) -> None:
    """Drops rows past `last_step` and lines that are no rows, so that each step stands once."""
    if not path.exists():
        return
    kept = [line + b"\n" for line, row in read_lines(path) if row["step"] <= last_step]
    replace_bytes(path, b"".join(kept))
