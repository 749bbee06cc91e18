"""What stops a run after the current step, with a checkpoint.

These are signals, a file in the run folder, and the job's time limit.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any

from megaconsa.errors import InputError
from megaconsa.training.callbacks.checkpointing import Checkpointing
from megaconsa.training.trainer import Callback, Order, Row, Stop, Trainer

logger = logging.getLogger(__name__)

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,  # A terminal closes. torchrun passes this on.
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,  # A limit on CPU time is reached.
)
STOP_FILE = "stop"
LOOK_SECONDS = 1.0
"""Time between two looks for the file. A look may take a millisecond on a shared file system."""
END_TIME = "SLURM_JOB_END_TIME"
"""Seconds since the epoch at which Slurm will end the job."""
MARGIN_SECONDS = 60.0
"""Margin for what is not measured: the end of all processes, or a temporarily slow file system."""
UNKNOWN_SAVE_SECONDS = 120.0
"""Assumed duration of a save before the first one has been timed."""
RECENT_STEPS = 50


class StopSignals(Callback):
    """Stops the run on signals that would otherwise end the process without a checkpoint.

    They include Ctrl-C, SIGTERM and the SIGUSR1 that `sbatch --signal` sends.

    A signal that was ignored stays ignored. nohup relies on this so that a run outlives its
    terminal.
    """

    order = Order.WATCH

    def __init__(self) -> None:
        self.before: dict[signal.Signals, Any] = {}

    def on_start(self, trainer: Trainer) -> None:
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        self._install(trainer)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        # Install the handlers again after every step. On a GPU, a run that had just compiled its
        # kernels died of a SIGTERM sent twice (as `timeout` does) in spite of the handler. Most
        # likely the LLVM inside Triton had installed its one-shot handlers. This fixes it.
        self._install(trainer)

    def on_finish(self, trainer: Trainer) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _install(self, trainer: Trainer) -> None:
        for number in SIGNALS:
            if self.before[number] is not signal.SIG_IGN:
                signal.signal(number, lambda *_: trainer.request_stop())


class StopFile(Callback):
    """Stops the run if RUN/stop exists. Runs on the main rank only.

    A person creates this file to end the run without having the job requeued.
    """

    order = Order.REQUEST
    main_rank_only = True

    def __init__(self, run: Path) -> None:
        self.path = run / STOP_FILE
        self.looked = -LOOK_SECONDS

    def on_step(self, trainer: Trainer, row: Row) -> None:
        now = time.monotonic()
        if now - self.looked >= LOOK_SECONDS:
            self.looked = now
            if self.path.exists():
                trainer.request_stop(Stop.ASKED)

    def on_finish(self, trainer: Trainer) -> None:
        if trainer.stop is Stop.ASKED:
            self.path.unlink(missing_ok=True)  # The next start must not stop again.
            logger.info("stopped because %s was there; it is removed", self.path)


class TimeLimit(Callback):
    """Stops the run before the job's time ends. Runs on the main rank only.

    It leaves enough time for two more steps, a save and a margin.
    """

    order = Order.REQUEST
    main_rank_only = True

    def __init__(self, end: float, checkpointing: Checkpointing) -> None:
        """end: when the job ends, in seconds since the epoch."""
        self.end = end
        self.checkpointing = checkpointing
        self.intervals: deque[float] = deque(maxlen=RECENT_STEPS)
        """Seconds between the ends of recent steps, including validation and checkpoint waits."""
        self.last = 0.0
        self.said = False

    def on_start(self, trainer: Trainer) -> None:
        self.last = time.monotonic()

    def on_step(self, trainer: Trainer, row: Row) -> None:
        now = time.monotonic()
        self.intervals.append(now - self.last)
        self.last = now
        slowest = max(self.intervals)
        save = self.checkpointing.longest_save or UNKNOWN_SAVE_SECONDS
        # One step in which all ranks learn of the stop, and one more. Each may be as slow as the
        # slowest.
        needed = 2 * slowest + save + MARGIN_SECONDS
        left = self.end - time.time()
        if left < needed and not self.said:
            self.said = True
            logger.warning(
                "the job ends in %.0f s: the run saves and stops, for two steps of up to %.1f s, "
                "a save of %.0f s and a margin of %.0f s "
                "need %.0f s",
                left,
                slowest,
                save,
                MARGIN_SECONDS,
                needed,
            )
            trainer.request_stop()


def job_end() -> float | None:
    """When Slurm will end the job, in seconds since the epoch.

    None outside of a job, or if the job has no time limit.
    Raises InputError if the environment variable is not a number.
    """
    text = os.environ.get(END_TIME, "")
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{END_TIME}={text} is no time in seconds since 1970; unset it") from None
