"""Writes metrics.jsonl: one JSON object per step."""

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
from megaconsa.training.trainer import Callback, Order, Row, Trainer

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 0.2
"""Time that a step waits for its row to be written."""
LAST_WAIT_SECONDS = 60.0
"""Time limit for writing the last rows at the end of a run."""


class MetricsFile(Callback):
    """Writes rows in a separate thread, so that an unresponsive file system does not block a step.

    Rows that cannot be written, for example because the disk is full, stay in memory. A later step
    tries to write them again.
    """

    order = Order.REPORT
    main_rank_only = True

    def __init__(self, run: Path) -> None:
        self.path = run / run_folder.METRICS
        self.waiting: list[bytes] = []
        """Rows not in the file yet. Steps append to it, and the thread removes from its front."""
        self.written = 0
        """Size in bytes of the complete rows in the file."""
        self.failing = False
        self.thread = ThreadPoolExecutor(1, "metrics")
        self.writing: Future[None] | None = None

    def on_start(self, trainer: Trainer) -> None:
        truncate(self.path, trainer.progress.step)
        self.written = self.path.stat().st_size if self.path.exists() else 0

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.waiting.append(json.dumps(row).encode() + b"\n")
        if not self._is_writing():
            # A step waits for its own row, so that no checkpoint is older than its metrics. It does
            # not wait long.
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
        """Lets the thread write the waiting rows, and waits at most `seconds` for it."""
        self.writing = self.thread.submit(self._append_waiting)
        wait([self.writing], seconds)
        if self.writing.done():
            self.writing.result()  # Raises errors that the disk did not cause.

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
        """Appends the rows to the file. Returns its new size in bytes.

        Raises OSError if not all of them fit.
        """
        with self.path.open("ab", buffering=0) as file:
            file.truncate(self.written)  # Removes a row that an earlier attempt wrote in part.
            file.write(rows)
            size = file.tell()
        if size != self.written + len(rows):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return size


def truncate(path: Path, last_step: int) -> None:
    """Removes rows after `last_step` and invalid lines, so that each step appears once."""
    if not path.exists():
        return
    kept = [line + b"\n" for line, row in read_lines(path) if row["step"] <= last_step]
    replace_bytes(path, b"".join(kept))
