"""Ends a run that hangs, with exit code LOST.

It first writes the stacks and collectives of every rank.
"""

from __future__ import annotations

import faulthandler
import math
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from torch._C import _distributed_c10d as c10d

from megaconsa import run_folder
from megaconsa.config import WatchdogSection
from megaconsa.data.stream import BatchStream
from megaconsa.errors import RunError
from megaconsa.exit_codes import LOST
from megaconsa.parallel.world import World
from megaconsa.training import failures
from megaconsa.training.trainer import Callback, Order, Row, Trainer

RECENT_STEPS = 50
LOOK_SECONDS = 1.0
"""Time between two looks at the clock."""
STANDSTILL_SECONDS = 10.0
"""A look this much too late means that the whole process was stopped, which is not a hang.

Slurm, for example, suspends jobs."""
GRACE_SECONDS = 5.0
"""Time for the other ranks to write their stacks.

When the first rank ends, the others are ended too."""
NAMED_FILES = 4
"""How many of the awaited files a message names."""
BACKSTOP_SECONDS = 60.0
"""Time after the longest limit at which faulthandler's own thread ends the process.

It is needed if no Python code can run, because a C call hangs and holds the interpreter."""


class Watchdog(Callback):
    """Must come before the callbacks whose work it watches.

    A step is done between its `before_step` and `on_step`. After that comes the work between steps.
    From `before_data` to `before_step`, the ranks wait for data: first for their own, then for that
    of the others.
    """

    order = Order.WATCH

    def __init__(
        self, run: Path, section: WatchdogSection, world: World, stream: BatchStream
    ) -> None:
        """stream: this rank's training data. Ranks where the pipeline does not begin read none."""
        self.run = run
        self.section = section
        self.world = world
        self.stream = stream
        self.seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        """Durations of recent steps, without the first step, which compiles."""
        self.steps = 0
        self.begun = 0.0
        """Start of the current step or pause, by time.monotonic."""
        self.deadline = 0.0
        """When the current step or pause is given up, by time.monotonic."""
        self.data_deadline = math.inf
        """When the current wait for this rank's own data is given up, by time.monotonic."""
        self.armed = -math.inf
        """When faulthandler's thread was last restarted."""
        self.main = threading.get_ident()
        """ID of the thread that trains."""
        self.over = threading.Event()
        self.trainer: Trainer | None = None

    @property
    def step_limit(self) -> float:
        """Seconds after which a step is given up."""
        if not self.seconds:
            return self.section.pause_seconds
        return max(self.section.minimum_seconds, self.section.factor * median(self.seconds))

    def on_start(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.main = threading.get_ident()
        self._allow(self.section.pause_seconds)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def before_data(self, trainer: Trainer) -> None:
        # Longer than the limit for own data, so that the rank whose data are missing ends first.
        others = self.section.data_seconds + 2 * GRACE_SECONDS
        self._allow(max(self.section.pause_seconds, others))
        self.data_deadline = self.begun + self.section.data_seconds

    def before_step(self, trainer: Trainer) -> None:
        self._allow(self.step_limit)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.steps += 1
        if self.steps > 1:
            self.seconds.append(time.monotonic() - self.begun)
        self._allow(self.section.pause_seconds)

    def on_finish(self, trainer: Trainer) -> None:
        self.over.set()
        faulthandler.cancel_dump_traceback_later()

    def _allow(self, seconds: float) -> None:
        """Starts a new time limit."""
        self.begun = time.monotonic()
        self.deadline = self.begun + seconds
        # Each call of faulthandler starts a new thread, which is too much for every short step.
        if self.begun - self.armed > BACKSTOP_SECONDS / 2:
            data_seconds = self.section.data_seconds
            longest = max(self.section.pause_seconds, data_seconds, self.step_limit)
            faulthandler.dump_traceback_later(longest + BACKSTOP_SECONDS, exit=True, file=2)
            self.armed = self.begun

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self.over.wait(LOOK_SECONDS):
            now = time.monotonic()
            if now - looked > LOOK_SECONDS + STANDSTILL_SECONDS:
                # The process was stopped. That time does not count.
                self.deadline += now - looked
                self.data_deadline += now - looked
            looked = now
            seconds = now - self.begun
            awaited = self.stream.awaited
            if awaited is not None and now > self.data_deadline:
                self._give_up(self._missing_data(awaited, seconds))
            if now > self.deadline:
                self._give_up(self._standstill(seconds))

    def _missing_data(self, awaited: np.ndarray, seconds: float) -> str:
        """Says which data this rank has waited for.

        awaited: places in the stream of the rows that are missing.
        seconds: time since the wait started.
        """
        files = self.stream.files(awaited)
        names = ", ".join(file.name for file in files[:NAMED_FILES])
        if len(files) > NAMED_FILES:
            names += f" and {len(files) - NAMED_FILES} more"
        return (
            f"rank {self.world.rank} has waited for its data for {seconds:.0f} s "
            f"(watchdog.data_seconds={self.section.data_seconds:g}): the next rows are in "
            f"{files[0].parent}, in {names}"
        )

    def _standstill(self, seconds: float) -> str:
        """Says where the main thread is.

        seconds: time since the step or pause started.
        """
        where = traceback.extract_stack(sys._current_frames()[self.main])[-1]
        if self.seconds:
            usual = f"a step usually takes {median(self.seconds):.3g} s"
        else:
            usual = "no step was timed yet"
        return (
            f"nothing has moved for {seconds:.0f} s ({usual}): the main thread is in "
            f"{where.name} ({where.filename}:{where.lineno})"
        )

    def _give_up(self, found: str) -> None:
        """Reports the hang and ends the process.

        found: what does not move.
        """
        assert self.trainer is not None
        try:
            found += f"; stacks and collectives lie in {self._leave_evidence(found)}"
        except OSError as error:
            faulthandler.dump_traceback(2)
            found += (
                f"; its stacks are printed above, for {self.run} cannot be written: "
                f"{error.strerror}"
            )
        time.sleep(GRACE_SECONDS)
        failures.end(
            RunError(found),
            self.run,
            self.world,
            self.trainer.progress.step + 1,
            code=LOST,
            kind="hang",
            always=True,
        )

    def _leave_evidence(self, found: str) -> Path:
        """Writes two files to RUN/incidents/LAUNCH and returns that folder.

        rank_N.txt holds the stacks of all threads. rank_N.json holds the recorded collectives,
        finished or not.
        """
        folder = self.run / run_folder.INCIDENT_STACKS / self.world.launch
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank_{self.world.rank}.txt"
        with path.open("w") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S %z")
            file.write(f"{now}  rank {self.world.rank} of {self.world.size}: {found}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
        # This is torch's flight recorder. Its documentation explains the fields. Its functions are
        # missing from torch's type stubs, so it is Any here.
        recorder: Any = c10d
        if self.world.device.type == "cuda":
            dump = recorder._dump_nccl_trace_json
        else:
            dump = recorder._dump_fr_trace_json
        path.with_suffix(".json").write_bytes(dump(True, False))
        return path.parent
