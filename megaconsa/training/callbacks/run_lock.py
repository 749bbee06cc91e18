"""One process at a time trains in a run folder."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from megaconsa.errors import InputError
from megaconsa.training.callbacks.base import Callback
from megaconsa.training.trainer import Trainer

logger = logging.getLogger(__name__)

NAME = ".lock"


class RunLock(Callback):
    """Makes the folder and holds a lock in it from construction to the end of the run.

    The kernel drops the lock when the process dies, so that what a killed run leaves in the file (host, pid, time) locks nobody out.
    """

    def __init__(self, run: Path) -> None:
        try:
            run.mkdir(parents=True, exist_ok=True)
            self.file = (run / NAME).open("a+")
        except OSError as error:
            raise InputError(f"run.dir={run} cannot be written: {error.strerror}") from None
        self.file.seek(0)
        holder = _describe(self.file.read())
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise _in_use(run, holder) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): make sure that no second process trains in it", run, error.strerror)
        if holder is not None:
            logger.info("the last run in %s, of %s, ended without a word; its lock is void", run, holder)
        # Processes that read data ahead are forks of this one and may outlive it for a while: they must not hold on to the lock.
        os.register_at_fork(after_in_child=self.file.close)
        self.file.truncate(0)
        self.file.write(
            json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        )
        self.file.flush()

    def on_finish(self, trainer: Trainer) -> None:
        self.release()

    def release(self) -> None:
        self.file.truncate(0)
        self.file.close()


def refuse_if_held(run: Path) -> None:
    """InputError where another process trains in the folder; writes nothing, so that it can be asked before all else."""
    try:
        with (run / NAME).open() as file:
            content = file.read()
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(run, _describe(content)) from None
    except OSError:
        return


def _in_use(run: Path, holder: str | None) -> InputError:
    return InputError(
        f"run.dir={run} is in use: {holder or 'another process'} trains in it; wait for it or choose another run.dir"
    )


def _describe(content: str) -> str | None:
    """Who wrote the lock; None where nobody did, or has finished since."""
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    except (ValueError, KeyError, TypeError):
        return None if not content else "another process"
