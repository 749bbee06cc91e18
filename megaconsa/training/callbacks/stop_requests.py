"""What ends a run after the present step, with a checkpoint: signals, a file in the run folder, the end of the job's time."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any

from megaconsa.errors import InputError
from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.callbacks.checkpointing import Checkpointing
from megaconsa.training.trainer import Stop, Trainer

logger = logging.getLogger(__name__)

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,  # a terminal that closes, which torchrun passes on
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,  # a limit on CPU time
)
STOP_FILE = "stop"
LOOK_SECONDS = 1.0
"""Between two looks for it: on a shared file system one may take a millisecond."""
END_TIME = "SLURM_JOB_END_TIME"
"""Seconds since the epoch at which Slurm will end the job."""
MARGIN_SECONDS = 60.0
"""For what nobody has measured: the end of all processes, a file system that is slow just then."""
UNKNOWN_SAVE_SECONDS = 120.0
"""For a save before the first has been timed."""
RECENT_STEPS = 50


class StopSignals(Callback):
    """Ctrl-C, SIGTERM, the SIGUSR1 that `sbatch --signal` sends, and whatever else would end the process without a checkpoint.

    What was ignored stays ignored: nohup has it so that the run outlives its terminal.
    """

    def __init__(self) -> None:
        self.before: dict[signal.Signals, Any] = {}

    def on_start(self, trainer: Trainer) -> None:
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        self._install(trainer)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        # Again after every step. On a GPU, a run that had just compiled its kernels died of a SIGTERM sent twice (as `timeout` does)
        # in spite of the handler; most likely the LLVM inside Triton had put its one-shot handlers in place. This mends it.
        self._install(trainer)

    def on_finish(self, trainer: Trainer) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _install(self, trainer: Trainer) -> None:
        for number in SIGNALS:
            if self.before[number] is not signal.SIG_IGN:
                signal.signal(number, lambda *_: trainer.request_stop())


class StopFile(Callback):
    """RUN/stop, which a person makes who wants the run to end and not to be queued again. On the main rank."""

    def __init__(self, run: Path) -> None:
        self.path = run / STOP_FILE
        self.looked = -LOOK_SECONDS

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if (now := time.monotonic()) - self.looked >= LOOK_SECONDS:
            self.looked = now
            if self.path.exists():
                trainer.request_stop(Stop.ASKED)

    def on_finish(self, trainer: Trainer) -> None:
        if trainer.stop is Stop.ASKED:
            self.path.unlink(missing_ok=True)  # the next start is to run
            logger.info("stopped because %s was there; it is removed", self.path)


class TimeLimit(Callback):
    """Stops while there is still time for two more steps, a save and a margin before the job ends. On the main rank."""

    def __init__(self, end: float, checkpointing: Checkpointing) -> None:
        """end: seconds since the epoch."""
        self.end, self.checkpointing = end, checkpointing
        self.intervals: deque[float] = deque(maxlen=RECENT_STEPS)
        """Seconds from one step's end to the next: with validation and waits for checkpoints."""
        self.last = 0.0
        self.said = False

    def on_start(self, trainer: Trainer) -> None:
        self.last = time.monotonic()

    def on_step(self, trainer: Trainer, row: Row) -> None:
        now = time.monotonic()
        self.intervals.append(now - self.last)
        self.last = now
        slowest, save = max(self.intervals), self.checkpointing.longest_save or UNKNOWN_SAVE_SECONDS
        # The step in which all ranks hear of it, and one that is as slow as the slowest.
        needed = 2 * slowest + save + MARGIN_SECONDS
        if (left := self.end - time.time()) < needed and not self.said:
            self.said = True
            logger.warning(
                "the job ends in %.0f s: the run saves and stops, for two steps of up to %.1f s, a save of %.0f s and a margin of %.0f s "
                "need %.0f s",
                left,
                slowest,
                save,
                MARGIN_SECONDS,
                needed,
            )
            trainer.request_stop()


def job_end() -> float | None:
    """When Slurm will end the job, in seconds since the epoch; None outside of a job, or where it has no time limit."""
    text = os.environ.get(END_TIME, "")
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{END_TIME}={text} is no time in seconds since 1970; unset it") from None
