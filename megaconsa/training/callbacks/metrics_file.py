"""Writes metrics.jsonl: one JSON object per step. samples.jsonl is written likewise."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
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
    """Writes the rows in a thread, so that a file system that hangs does not hold up the training.

    Rows that cannot be written, for example because the disk is full, wait in memory for a later
    step.
    """

    order = Order.REPORT
    main_rank_only = True

    def __init__(self, run: Path, name: str = run_folder.METRICS) -> None:
        self.path = run / name
        self.waiting: list[bytes] = []
        """Rows that are not in the file yet. Steps append, the thread removes from the front."""
        self.written = 0
        """Bytes of the file that are whole rows."""
        self.failure: str | None = None
        """Why the last write failed."""
        self.thread: threading.Thread | None = None
        self.bug: Exception | None = None
        """An error of the thread that the disk did not cause. The next step raises it."""
        self.abandoned = False
        """The run has ended. A write that still hangs must not touch the file any more."""

    def on_start(self, trainer: Trainer) -> None:
        truncate(self.path, trainer.progress.step)
        self.written = self.path.stat().st_size if self.path.exists() else 0

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.waiting.append(json.dumps(row).encode() + b"\n")
        if not self._is_writing():
            # Usually the row is in the file before a checkpoint of its step is saved.
            self._write(PATIENCE_SECONDS)

    def on_finish(self, trainer: Trainer) -> None:
        if self.thread is not None:
            self.thread.join(LAST_WAIT_SECONDS)
        if self.waiting and not self._is_writing():
            self._write(LAST_WAIT_SECONDS)
        self.abandoned = True
        if self.waiting:
            reason = self.failure or "no answer"
            logger.error("the last rows of %s are lost: %s", self.path, reason)

    def _is_writing(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def _write(self, seconds: float) -> None:
        """Has a thread write the waiting rows. Waits for it, but not longer than `seconds`."""
        if self.bug is not None:
            raise self.bug
        # A daemon, because a process must be able to exit while its file system hangs.
        self.thread = threading.Thread(target=self._append_waiting, name="metrics", daemon=True)
        self.thread.start()
        self.thread.join(seconds)

    def _append_waiting(self) -> None:
        count = len(self.waiting)
        rows = b"".join(self.waiting[:count])
        try:
            self.written = self._append(rows)
        except OSError as error:
            if self.failure is None:
                logger.error(
                    "%s cannot be written: %s; its rows wait in memory", self.path, error.strerror
                )
            self.failure = error.strerror
            return
        except Exception as error:
            self.bug = error
            return
        self.failure = None
        del self.waiting[:count]

    def _append(self, rows: bytes) -> int:
        """Appends the rows and returns the size of the file."""
        with self.path.open("ab", buffering=0) as file:
            if self.abandoned:
                # Another process may be writing the file by now.
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            # An earlier write may have appended only a part of a row.
            file.truncate(self.written)
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
