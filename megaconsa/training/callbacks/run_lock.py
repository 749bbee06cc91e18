"""One process at a time trains in a run folder."""

from __future__ import annotations

import fcntl
from pathlib import Path

from megaconsa.errors import InputError
from megaconsa.training.callbacks.base import Callback
from megaconsa.training.trainer import Trainer


class RunLock(Callback):
    """Makes the folder and holds a lock in it from construction to the end of the run; the kernel drops it if the process dies."""

    def __init__(self, run: Path) -> None:
        try:
            run.mkdir(parents=True, exist_ok=True)
            self.file = (run / ".lock").open("w")
        except OSError as error:
            raise InputError(f"run.dir={run} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise InputError(
                f"run.dir={run} is in use: another process trains in it; wait for it or choose another run.dir"
            ) from None

    def on_finish(self, trainer: Trainer) -> None:
        self.file.close()
