"""The process that copies a run's checkpoints into an object store, beside training.

    python -m megaconsa.checkpoint.uploader RUN REMOTE KEEP_EVERY

It is a process of its own, because checksums and encryption would slow the trainer down.
It ends when its standard input is closed, once the newest checkpoint is copied.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import time
from pathlib import Path

from megaconsa import incidents
from megaconsa.checkpoint.remote import Uploads, upload
from megaconsa.checkpoint.writer import is_kept_for_ever
from megaconsa.errors import DataError, InputError, UnreachableError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""Time between two looks for a new checkpoint."""
PAUSE_SECONDS = 60.0
"""Pause after a copy that failed."""


def main() -> None:
    run, remote, keep_every = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Signals of the scheduler reach the trainer, which saves and then closes the input.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    uploads = Uploads(run, remote)
    while True:
        ends = _closed_within(LOOK_SECONDS)
        for path in uploads.pending(lambda path: is_kept_for_ever(path, keep_every)):
            if not _copy(run, path, remote, uploads):
                if ends:
                    return
                ends = _closed_within(PAUSE_SECONDS)
                break
        if ends and not uploads.pending(lambda path: False):
            return


def _copy(run: Path, path: Path, remote: str, uploads: Uploads) -> bool:
    """Copies one checkpoint. Returns whether that succeeded."""
    started = time.monotonic()
    try:
        upload(path, remote)
    except (DataError, InputError, UnreachableError) as error:
        step = int(path.name.removeprefix("step_"))
        text = f"its copy could not be written: {error}"
        incidents.record(run, "checkpoint", text, step=step, rank=0)
        logger.error("checkpoint %s: %s; training continues, and it is tried again", path, text)
        return False
    uploads.add(path)
    seconds = time.monotonic() - started
    logger.info("checkpoint %s is copied to %s and verified (%.0f s)", path.name, remote, seconds)
    return True


def _closed_within(seconds: float) -> bool:
    """Waits, and returns at once when the standard input is closed. Returns whether it is."""
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    main()
