"""Copies checkpoints into an object store while training continues."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from megaconsa.config.sections import CheckpointSection
from megaconsa.training.trainer import Callback, Order, Row, Trainer

logger = logging.getLogger(__name__)

LAST_WAIT_SECONDS = 600.0
"""How long the end of a run waits for the copy of its last checkpoint."""


class CheckpointUpload(Callback):
    """Runs the process that copies checkpoints (checkpoint/uploader.py).

    The copies change nothing about the checkpoints in the run folder.
    """

    # Its `on_finish` comes after that of Checkpointing, which ends the last save.
    order = Order.WATCH
    main_rank_only = True

    def __init__(self, run: Path, settings: CheckpointSection) -> None:
        assert settings.upload is not None
        self.remote = settings.upload
        self.command = [sys.executable, "-m", "megaconsa.checkpoint.uploader", str(run)]
        self.command += [self.remote, str(settings.keep_every)]
        self.process: subprocess.Popen[bytes] | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, start_new_session=True)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if self.process is not None and self.process.poll() is not None:
            logger.error("the process that copies checkpoints to %s has died", self.remote)
            self.on_start(trainer)

    def on_finish(self, trainer: Trainer) -> None:
        if self.process is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        if not trainer.completed:
            # The process ends by itself. The next start copies what it did not.
            return
        try:
            self.process.wait(LAST_WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            logger.error("the last checkpoint is not yet copied to %s", self.remote)
            self.process.kill()
