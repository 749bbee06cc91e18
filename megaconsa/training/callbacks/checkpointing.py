"""Saving checkpoints every n steps or minutes, at the end, and before a run stops on a signal.

Checkpoints are written in the background while training continues.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megaconsa import incidents, run_folder
from megaconsa.checkpoint.writer import Result, Snapshot, Staging, Writer
from megaconsa.config import CheckpointSection
from megaconsa.consa.gates import GateBank
from megaconsa.errors import RunError, UnreachableError
from megaconsa.files import replace_text
from megaconsa.parallel.world import World
from megaconsa.training.trainer import Callback, Order, Row, Stop, Trainer

logger = logging.getLogger(__name__)

LAST_WAIT_SECONDS = 60.0
"""Time limit for a pending write when an error ends the run.

The other ranks may be gone, and then the write never ends."""
LONG_WAIT_SECONDS = 1.0
"""A wait for the previous write is logged if it takes longer than this."""
FAILED_SAVES = 2
"""Failed saves in a row after which the run ends, because further training would be lost."""


class Checkpointing(Callback):
    order = Order.SAVE

    def __init__(
        self, run: Path, section: CheckpointSection, world: World, description: dict[str, Any]
    ) -> None:
        """Every rank makes one.

        description: what state.json holds besides the trainer's progress (configuration, shape,
            data).
        """
        self.run = run
        self.every = section.every
        self.description = description
        self.seconds = 60 * section.minutes
        self.writer = Writer(
            run,
            section.keep,
            section.keep_every,
            world.rank,
            world.size,
            world.launch,
            world.exchange,
        )
        self.staging = Staging()
        self.longest_save: float | None = None
        """Seconds from the start of the longest save to its end. None before a save has ended."""
        self.due = False
        """Whether a save is due but waits for a step that is applied."""
        self.failed = 0
        """Failed saves in a row, among those that have ended."""
        self.error: str | None = None
        """Error of the last save that has ended. None if it succeeded."""
        self._stall = 0.0
        self._saved_at = time.monotonic()

    def on_start(self, trainer: Trainer) -> None:
        self._saved_at = time.monotonic()
        if not (self.every or self.seconds):
            logger.warning(
                "no checkpoint before the last step: a lost node would lose the whole run; "
                "set checkpoint.minutes"
            )
        if trainer.mesh.is_main:
            self.writer.clean()

    def on_step(self, trainer: Trainer, row: Row) -> None:
        step = trainer.progress.step
        self._report(trainer, self.writer.poll())
        if trainer.stop is Stop.UNSAVED and step < trainer.training.steps:
            raise self._unsaved()
        last = self._is_last(trainer)
        by_steps = self.every > 0 and step % self.every == 0
        self.due = self.due or by_steps or trainer.saving
        # While steps are skipped, the weights themselves may be bad. Then the existing checkpoints
        # may be the last good ones, and a save could replace them.
        if last or (self.due and not trainer.progress.bad_steps.in_row):
            self.due = False
            self.save(trainer, row)
        elif (
            trainer.mesh.is_main
            and self.seconds
            and time.monotonic() - self._saved_at > self.seconds
        ):
            # The clocks of the ranks differ, so the main rank decides. The other ranks hear of it
            # with the next step.
            trainer.request_save()
        if last:
            result = self.writer.wait()
            if result is not None and result.error is not None:
                self._count(result)
                if self.failed >= FAILED_SAVES:
                    raise self._unsaved()
                raise RunError(
                    f"the checkpoint of step {step} could not be written: {result.error}; "
                    f"older ones in {self.run} are whole"
                )

    def on_finish(self, trainer: Trainer) -> None:
        self._report(trainer, self.writer.wait(LAST_WAIT_SECONDS))

    def save(self, trainer: Trainer, row: Row) -> None:
        """Copies the training state to host memory and starts to write it.

        Raises UnreachableError if too many earlier saves have failed.
        """
        started = time.monotonic()
        self._saved_at = started
        before = self.writer.wait()
        if before is not None:
            self._report(trainer, before)
            waited = time.monotonic() - started
            if waited > LONG_WAIT_SECONDS:
                logger.warning(
                    "step %d waited %.0f s until the checkpoint of step %d was written, "
                    "which took %.0f s; raise checkpoint.every",
                    trainer.progress.step,
                    waited,
                    before.step,
                    before.seconds,
                )
        # All ranks know of the same saves at this point, so they all raise or none does. The last
        # save is tried in any case.
        if self.failed >= FAILED_SAVES and not self._is_last(trainer):
            raise self._unsaved()
        engine = trainer.engine
        weights = self.staging.copy(engine.weights())
        moments = self.staging.copy(engine.moments())
        losses: Row = {name: row[name] for name in ("loss", "validation_loss") if name in row}
        state: dict[str, Any] = {
            **asdict(trainer.progress),
            **losses,
            "optimizer_steps": engine.optimizer_steps,
            **self.description,
        }
        # The main rank alone saves what is the same on all ranks.
        is_main = trainer.mesh.is_main
        gates = trainer.gates if is_main else None
        gate_state = None
        if gates:
            gate_state = {
                name: value.detach().cpu().clone() for name, value in gates.state().items()
            }
        snapshot = Snapshot(
            trainer.progress.step,
            weights,
            moments,
            _random_states(trainer.mesh.device),
            state if is_main else None,
            gate_state,
            trainer.allocation if is_main else None,
        )
        self._stall = time.monotonic() - started
        self.writer.begin(snapshot, self._stall)
        if gates:
            path = self.run / run_folder.GATES
            try:
                _write_gates(path, trainer.progress.step, gates)
            except OSError as error:
                logger.error("%s could not be written: %s", path, error.strerror)

    def _is_last(self, trainer: Trainer) -> bool:
        """Whether this step is the last one of the process, and is saved."""
        ends = trainer.progress.step == trainer.training.steps or trainer.stopping
        # A rewind returns to an earlier checkpoint, so it must not write a new one.
        return ends and trainer.stop is not Stop.REWIND

    def _report(self, trainer: Trainer, result: Result | None) -> None:
        """Counts and logs the end of a save, if there is one."""
        if result is None:
            return
        self._count(result)
        self.longest_save = max(self.longest_save or 0.0, self._stall + result.seconds)
        gives_up = self.failed >= FAILED_SAVES
        if gives_up:
            # Ranks hear of the end of a write at different steps. This request makes them end
            # together after the next step.
            trainer.request_stop(Stop.UNSAVED)
        if result.error is not None and trainer.mesh.is_main:
            incidents.record(
                self.run,
                "checkpoint",
                f"it could not be written: {result.error}",
                step=result.step,
                rank=0,
            )
            if gives_up:
                outcome = "the run ends"
            else:
                outcome = "training continues, and ends if the next one fails too"
            logger.error(
                "the checkpoint of step %d could not be written: %s; "
                "older checkpoints are whole; %s",
                result.step,
                result.error,
                outcome,
            )

    def _count(self, result: Result) -> None:
        self.failed = 0 if result.error is None else self.failed + 1
        self.error = result.error

    def _unsaved(self) -> UnreachableError:
        return UnreachableError(
            f"{FAILED_SAVES} checkpoints in a row could not be written ({self.error}); "
            "make room or repair "
            f"the disk of {self.run}, then run the same command: "
            "it resumes from the newest checkpoint"
        )


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _write_gates(path: Path, step: int, gates: GateBank) -> None:
    """Writes the newest gates and their evidence, for people and plots."""
    content = {"step": step} | gates.describe()
    replace_text(path, json.dumps(content))
