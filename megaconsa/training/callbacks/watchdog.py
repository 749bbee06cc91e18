"""Gives up a run that hangs: leaves the stacks and collectives of every rank, and ends the process with exit code LOST."""

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

from torch._C import _distributed_c10d as c10d

from megaconsa import run_folder
from megaconsa.config import WatchdogSection
from megaconsa.errors import RunError
from megaconsa.exit_codes import LOST
from megaconsa.parallel.world import World
from megaconsa.training import failures
from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Trainer

RECENT_STEPS = 50
LOOK_SECONDS = 1.0
"""Between two looks at the clock."""
STANDSTILL_SECONDS = 10.0
"""A look that comes so much too late means that the whole process stood still (Slurm suspends jobs): that is no hang."""
GRACE_SECONDS = 5.0
"""For the other ranks to write their stacks, before the first to end takes them with it."""
BACKSTOP_SECONDS = 60.0
"""After which faulthandler's own thread ends a process in which no Python runs at all: a C call that hangs and holds the interpreter."""


class Watchdog(Callback):
    """Comes first among the callbacks: between `before_step` and `on_step` a step is done, from there on what lies between steps."""

    def __init__(self, run: Path, section: WatchdogSection, world: World) -> None:
        self.run, self.section, self.world = run, section, world
        self.seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        """Of the last steps, without the first, which compiles."""
        self.steps = 0
        self.begun = self.deadline = 0.0
        self.armed = -math.inf
        """When faulthandler's thread was last told to wait."""
        self.main = threading.get_ident()
        self.over = threading.Event()
        self.trainer: Trainer | None = None

    @property
    def step_limit(self) -> float:
        """Seconds after which a step is given up."""
        if not self.seconds:
            return self.section.pause_seconds
        return max(self.section.minimum_seconds, self.section.factor * median(self.seconds))

    def on_start(self, trainer: Trainer) -> None:
        self.trainer, self.main = trainer, threading.get_ident()
        self._allow(self.section.pause_seconds)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

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
        self.begun = time.monotonic()
        self.deadline = self.begun + seconds
        # Each call starts a thread anew, so not at every short step.
        if self.begun - self.armed > BACKSTOP_SECONDS / 2:
            longest = max(self.section.pause_seconds, self.step_limit)
            faulthandler.dump_traceback_later(longest + BACKSTOP_SECONDS, exit=True, file=2)
            self.armed = self.begun

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self.over.wait(LOOK_SECONDS):
            now = time.monotonic()
            if now - looked > LOOK_SECONDS + STANDSTILL_SECONDS:
                self.deadline += now - looked
            looked = now
            if now > self.deadline:
                self._give_up(now - self.begun)

    def _give_up(self, seconds: float) -> None:
        assert self.trainer is not None
        where = traceback.extract_stack(sys._current_frames()[self.main])[-1]
        usual = (
            f"a step usually takes {median(self.seconds):.3g} s"
            if self.seconds
            else "no step was timed yet"
        )
        found = f"nothing has moved for {seconds:.0f} s ({usual}): the main thread is in {where.name} ({where.filename}:{where.lineno})"
        try:
            found += f"; stacks and collectives lie in {self._leave_evidence(found)}"
        except OSError as error:
            faulthandler.dump_traceback(2)
            found += f"; its stacks are printed above, for {self.run} cannot be written: {error.strerror}"
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
        """Writes RUN/incidents/LAUNCH/rank_N.txt, the stacks of all threads, and rank_N.json, the collectives that are not done."""
        folder = self.run / run_folder.INCIDENT_STACKS / self.world.launch
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank_{self.world.rank}.txt"
        with path.open("w") as file:
            file.write(
                f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}  rank {self.world.rank} of {self.world.size}: {found}\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file)
        # torch's flight recorder; for what each field says, see its documentation.
        recorder: Any = c10d  # of which torch's stubs say nothing
        dump = (
            recorder._dump_nccl_trace_json
            if self.world.device.type == "cuda"
            else recorder._dump_fr_trace_json
        )
        path.with_suffix(".json").write_bytes(dump(True, False))
        return path.parent
